// The page: a conversation with the served model, and what runs meanwhile.

import { onKeyWanted, request } from "./api.js";
import { byId, el } from "./dom.js";
import { FiguresView } from "./figures.js";
import { count } from "./format.js";
import { generate, requestBody } from "./generation.js";
import { setUpLayout } from "./layout.js";
import { MetricsPoll } from "./metrics.js";
import {
  invalidField,
  labelOf,
  setUpSettings,
  settings,
  showThinking,
  showUse,
} from "./settings.js";
import * as store from "./store.js";
import { TurnView } from "./turns.js";

const prompt = byId("prompt");
const thread = byId("thread");
const modelSelect = byId("model");

let conversation = store.newConversation();
let models = new Map(); // of the server, by id
const answers = new Map(); // {conversation, view, abort} of those that come now, by its id
let editing = null; // the turn that the next message replaces
let draft = ""; // what was in the field before that
const views = new WeakMap(); // of turns
// A browser opens six connections to a server, and the figures need one.
const MOST_ANSWERS = 5;

// ---- the conversation

function showConversation() {
  answers.get(conversation.id)?.view.update(true); // Not drawn while it was out of sight.
  byId("turns").replaceChildren(...conversation.turns.map((turn) => viewOf(turn).node));
  byId("welcome").hidden = conversation.turns.length > 0;
  thread.scrollTop = thread.scrollHeight;
  showHistory();
  showButtons();
}

function viewOf(turn) {
  if (!views.has(turn)) views.set(turn, new TurnView(turn, { retry, edit, answerCalls }));
  return views.get(turn);
}

function showHistory() {
  const items = store.conversations().map((kept) => {
    const open = el("button", { type: "button", class: "open" }, store.title(kept));
    if (kept.id === conversation.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => openConversation(kept));
    const remove = el("button", { type: "button", class: "quiet remove" }, "✕");
    remove.setAttribute("aria-label", `Delete: ${store.title(kept)}`);
    remove.addEventListener("click", () => removeConversation(kept));
    const busy = el("span", { class: "busy", role: "img", "aria-label": "Being answered" });
    return el("li", {}, open, ...(answers.has(kept.id) ? [busy] : []), remove);
  });
  byId("conversations").replaceChildren(...items);
}

function openConversation(kept) {
  stopEditing();
  conversation = answers.get(kept.id)?.conversation ?? kept;
  showConversation();
  layout.close();
  prompt.focus();
}

function removeConversation(kept) {
  if (!confirm(`Delete “${store.title(kept)}”?`)) return;
  answers.get(kept.id)?.abort.abort();
  answers.delete(kept.id); // What comes of it is not kept.
  store.forget(kept.id);
  if (kept.id === conversation.id) openConversation(store.newConversation());
  else showHistory();
}

// ---- sending

/** Whether the conversation can be answered now; says why if that cannot be seen. */
function mayAnswer() {
  if (answers.has(conversation.id)) return false;
  if (answers.size < MOST_ANSWERS) return true;
  notice(`${MOST_ANSWERS} answers are being written, as many as a browser takes at once.`);
  return false;
}

function send() {
  const content = prompt.value;
  if (!content.trim() || !mayAnswer()) return;
  if (editing) conversation.turns.length = conversation.turns.indexOf(editing);
  else prompt.value = "";
  conversation.turns.push({ role: "user", content });
  answer();
}

function retry(turn) {
  if (!mayAnswer()) return;
  conversation.turns.length = conversation.turns.indexOf(turn);
  answer();
}

function answerCalls(turn) {
  if (!mayAnswer()) return;
  conversation.turns.length = conversation.turns.indexOf(turn) + 1;
  answer();
}

function edit(turn) {
  if (answers.has(conversation.id)) return;
  if (!editing) draft = prompt.value;
  editing = turn;
  prompt.value = turn.content;
  fitPrompt();
  prompt.focus();
  notice("Sending replaces this message and what follows. Esc leaves it as it is.");
}

function stopEditing() {
  if (editing) prompt.value = draft;
  editing = null;
  notice("");
  fitPrompt();
}

/** Asks for the next turn, and shows and keeps what comes, whatever ends it. */
async function answer() {
  stopEditing();
  const mine = conversation;
  const before = [...mine.turns];
  const turn = { role: "assistant", content: "", model: modelSelect.value };
  const coming = { conversation: mine, view: viewOf(turn), abort: new AbortController() };
  const { signal } = coming.abort;
  mine.turns.push(turn);
  store.keep(mine);
  answers.set(mine.id, coming);
  showConversation();
  try {
    await generate(checkedBody(before), turn, signal, frames(coming));
  } catch (error) {
    if (signal.aborted) turn.finish = "stopped";
    else turn.error = explain(error);
  }
  if (answers.get(mine.id) !== coming) return; // The conversation was deleted.
  answers.delete(mine.id);
  if (!store.keep(mine)) notice("This browser has no room left; the conversation is not kept.");
  showHistory();
  if (mine !== conversation) return;
  showButtons();
  follow(coming.view, false);
  byId("announcer").textContent = turn.error ?? turn.content;
}

function checkedBody(turns) {
  const wrong = invalidField();
  if (wrong) throw new Error(`The setting “${labelOf(wrong)}”: ${wrong.validationMessage}`);
  try {
    return requestBody(modelSelect.value, turns, settings());
  } catch {
    throw new Error("The setting “Tools” is no JSON list.");
  }
}

function explain(error) {
  return error instanceof TypeError ? "The server cannot be reached." : error.message;
}

/** Updates the view, and keeps the end in sight for those who were looking at it. */
function follow(view, live = true) {
  const atEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  view.update(live);
  if (atEnd) thread.scrollTop = thread.scrollHeight;
}

/** Draws an answer at most once a frame while it comes and is in sight. */
function frames(coming) {
  let wanted = false;
  return () => {
    if (wanted) return;
    wanted = true;
    requestAnimationFrame(() => {
      wanted = false;
      if (answers.get(conversation.id) === coming) follow(coming.view);
    });
  };
}

function showButtons() {
  const busy = answers.has(conversation.id);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
}

function stop() {
  answers.get(conversation.id)?.abort.abort();
}

// ---- the model and the server's state

async function loadModels() {
  try {
    const { data } = await (await request("v1/models")).json();
    const chosen = modelSelect.value || localStorage.getItem("quire.model");
    models = new Map(data.map((model) => [model.id, model]));
    modelSelect.replaceChildren(...data.map(({ id }) => el("option", { value: id }, id)));
    if (models.has(chosen)) modelSelect.value = chosen;
    modelChosen();
  } catch (error) {
    notice(explain(error));
  }
}

function modelChosen() {
  localStorage.setItem("quire.model", modelSelect.value);
  prompt.placeholder = `Message ${modelSelect.value}`;
  byId("welcome-model").textContent = `You are talking to ${modelSelect.value}.`;
  showUse(modelSelect.value);
  showThinking(models.get(modelSelect.value));
}

function showFigures(figures, view) {
  if (figures.state === "ready" && !modelSelect.options.length) loadModels();
  byId("state").textContent = figures.state === "ready" ? "" : figures.state;
  byId("state").dataset.state = figures.state;
  byId("speed").textContent =
    figures.tokensPerSecond >= 1 ? `${count(figures.tokensPerSecond)} tokens/s` : "";
  view.show(figures);
}

// ---- the rest of the page

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function exportAll() {
  const text = JSON.stringify(store.conversations(), null, 1);
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: address, download: "quire-conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

async function importFile(event) {
  const [file] = event.target.files;
  event.target.value = "";
  try {
    notice(`${store.importAll(await file.text())} conversations imported.`);
  } catch {
    notice(`${file.name} holds no conversations of this page.`);
  }
  showHistory();
}

function askForKey(refused) {
  const dialog = byId("key-dialog");
  byId("key").form.reset(); // An empty field is no mistake yet.
  byId("key-refused").hidden = !refused;
  dialog.returnValue = ""; // Escape leaves the value of the last time.
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => resolve(dialog.returnValue === "ok" ? byId("key").value.trim() : null),
      { once: true },
    );
  });
}

function onKey(event) {
  const typing = event.target.matches("input, textarea, select");
  if (event.key === "Escape" && !layout.close()) {
    if (answers.has(conversation.id)) stop();
    else stopEditing();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    prompt.focus();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    openConversation(store.newConversation());
  }
}

function setUp() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", fitPrompt);
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", () => openConversation(store.newConversation()));
  byId("export").addEventListener("click", exportAll);
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));
  byId("import-file").addEventListener("change", importFile);
  modelSelect.addEventListener("change", modelChosen);
  document.addEventListener("keydown", onKey);
  window.addEventListener("storage", showHistory);
  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      prompt.value = chip.textContent;
      send();
    });
  }
  setUpSettings();
  showConversation();
  const view = new FiguresView(byId("figures"));
  new MetricsPoll((figures) => showFigures(figures, view));
  loadModels();
  prompt.focus();
}

const layout = setUpLayout();
onKeyWanted(askForKey);
setUp();
