// One turn of the conversation, as nodes that follow the turn while it grows.

import { copyButton, el } from "./dom.js";
import { count, seconds } from "./format.js";
import { MarkdownView } from "./markdown.js";

/**
 * A turn is {role: "user", content} or {role: "assistant", content, reasoning, calls, figures,
 * error, finish}. `actions` is {retry(turn), edit(turn), answerCalls(turn)}.
 */
export class TurnView {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.node = el("li", { class: `turn ${turn.role}` });
    this.node.append(el("h2", { class: "sr" }, turn.role === "user" ? "You" : "The model"));
    if (turn.role === "user") this.buildUser();
    else this.buildAssistant();
  }

  buildUser() {
    const edit = el("button", { type: "button", class: "quiet small" }, "Edit");
    edit.addEventListener("click", () => this.actions.edit(this.turn));
    this.node.append(
      el("div", { class: "bubble" }, this.turn.content),
      el("div", { class: "foot" }, copyButton(() => this.turn.content), edit),
    );
  }

  buildAssistant() {
    this.thought = el("div", { class: "thought" });
    this.summary = el("summary");
    this.reasoning = el("details", { class: "reasoning" }, this.summary, this.thought);
    this.prose = new MarkdownView();
    this.calls = el("div", { class: "calls" });
    this.waiting = el("p", { class: "dots", role: "img", "aria-label": "Waiting" }, el("i"), el("i"), el("i"));
    this.error = el("p", { class: "error", role: "alert" });
    this.meta = el("span", { class: "meta" });
    this.again = el("button", { type: "button", class: "quiet small" }, "Try again");
    this.again.addEventListener("click", () => this.actions.retry(this.turn));
    this.copy = copyButton(() => this.turn.content);
    this.foot = el("div", { class: "foot" }, this.meta, this.copy, this.again);
    const { reasoning, prose, waiting, calls, error, foot } = this;
    this.node.append(reasoning, prose.node, waiting, calls, error, foot);
    this.update(false);
  }

  /** Shows the turn as it is now; `live` while more of it comes. */
  update(live) {
    const { content, reasoning, calls = [], error, figures } = this.turn;
    this.node.classList.toggle("live", live);
    this.reasoning.hidden = !reasoning;
    if (reasoning && this.thought.textContent !== reasoning) this.thought.textContent = reasoning;
    this.summary.textContent = this.thoughtTitle(live && !content && !calls.length);
    this.prose.update(content);
    this.waiting.hidden = !live || Boolean(content || reasoning || calls.length);
    if (live || this.calls.childElementCount !== calls.length || !this.callsFinal) {
      this.calls.replaceChildren(...calls.map((call) => this.callNode(call, live)));
      this.callsFinal = !live;
      if (!live && calls.length) this.calls.append(this.sendResults());
    }
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
    this.meta.textContent = figures ? describe(figures, this.turn.finish) : "";
    this.copy.hidden = live || !content;
    this.again.hidden = live;
  }

  thoughtTitle(thinking) {
    if (thinking) return "Thinking…";
    const time = this.turn.figures?.thought;
    return time ? `Thought for ${seconds(time)}` : "Thought";
  }

  callNode(call, live) {
    const node = el(
      "section",
      { class: "call" },
      el("p", { class: "call-name" }, call.name || "…"),
      el("pre", {}, pretty(call.arguments, live)),
    );
    if (!live) {
      const result = el("textarea", { rows: 1, value: call.result ?? "", placeholder: "Result" });
      result.setAttribute("aria-label", `Result of ${call.name}`);
      result.addEventListener("input", () => (call.result = result.value));
      node.append(result);
    }
    return node;
  }

  sendResults() {
    const send = el("button", { type: "button", class: "small" }, "Send the results");
    send.addEventListener("click", () => this.actions.answerCalls(this.turn));
    return el("p", { class: "send-results" }, send);
  }
}

function pretty(text, live) {
  if (live) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // Cut off by the token limit.
  }
}

const FINISH = { length: "cut off at the token limit", stopped: "stopped" };

// A tool call's opening is held back until its name is known: if more tokens than these came with
// the first delta, it was not the first token that came then.
const MOST_AT_FIRST = 4;

function describe({ tokens, tokensAtFirst = 1, firstToken, time, cached }, finish) {
  const parts = [];
  const since = tokens - tokensAtFirst;
  if (tokens) parts.push(`${count(tokens)} tokens`);
  if (since > 0 && time - firstToken > 0.05) {
    parts.push(`${count(since / (time - firstToken))} tokens/s`);
  }
  if (firstToken && tokensAtFirst <= MOST_AT_FIRST) parts.push(`first after ${seconds(firstToken)}`);
  if (cached) parts.push(`${count(cached)} from cache`);
  if (FINISH[finish]) parts.push(FINISH[finish]);
  return parts.join(" · ");
}
