// One answer: what is asked, and how the chunks of the stream become a turn.

import { chatChunks } from "./api.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** The body of a chat completion. Throws SyntaxError if the settings' tools are no JSON list. */
export function requestBody(model, turns, settings) {
  const body = { model, messages: [] };
  if (settings.system?.trim()) body.messages.push({ role: "system", content: settings.system });
  for (const turn of turns) body.messages.push(...messagesOf(turn));
  for (const name of NUMBERS) {
    if (settings[name] !== undefined && settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (settings.thinking) body.enable_thinking = settings.thinking === "on";
  if (settings.tools?.trim()) {
    body.tools = JSON.parse(settings.tools);
    if (!Array.isArray(body.tools)) throw new SyntaxError("not a list");
  }
  return body;
}

function messagesOf({ role, content, calls = [] }) {
  if (!calls.length) return role === "assistant" && !content ? [] : [{ role, content }];
  const toolCalls = calls.map(({ id, name, arguments: text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  const results = calls.map(({ id, result }) => ({
    role: "tool",
    tool_call_id: id,
    content: result ?? "",
  }));
  return [{ role, content: content || null, tool_calls: toolCalls }, ...results];
}

/** Fills `turn` from the server's stream and calls `changed` after every chunk. */
export async function generate(body, turn, signal, changed) {
  const began = performance.now();
  const elapsed = () => (performance.now() - began) / 1000;
  turn.figures = {};
  const { figures } = turn;
  for await (const chunk of chatChunks(body, signal)) {
    if (chunk.usage) {
      // Tokens may come without a delta: those that end a tool call.
      if (chunk.usage.completion_tokens > figures.tokens) figures.time = elapsed();
      figures.tokens = chunk.usage.completion_tokens;
      figures.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    for (const { delta, finish_reason: finish } of chunk.choices) {
      if (addDelta(turn, delta)) {
        figures.firstToken ??= elapsed();
        figures.tokensAtFirst ??= figures.tokens;
        figures.time = elapsed();
      }
      if (turn.reasoning && !turn.content && !turn.calls?.length) figures.thought = elapsed();
      if (finish) turn.finish = finish;
    }
    changed();
  }
  if (!turn.finish) throw new Error("The connection ended before the answer did.");
}

function addDelta(turn, delta) {
  const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
  const content = delta.content ?? "";
  if (reasoning) turn.reasoning = (turn.reasoning ?? "") + reasoning;
  turn.content += content;
  for (const { index, id, function: part = {} } of delta.tool_calls ?? []) {
    turn.calls ??= [];
    const call = (turn.calls[index] ??= { id: "", name: "", arguments: "" });
    call.id = id ?? call.id;
    call.name += part.name ?? "";
    call.arguments += part.arguments ?? "";
  }
  return Boolean(reasoning || content || delta.tool_calls?.length);
}
