// The form beside the conversation, kept in this browser.

import { hasKey } from "./api.js";
import { byId, copyButton, el } from "./dom.js";
import { keepSettings, settings as kept } from "./store.js";

const form = byId("settings");

/** What the form says, by field name; "" stands for the server's default. */
export function settings() {
  return Object.fromEntries(new FormData(form));
}

/** The first field that holds no valid value, or null. */
export function invalidField() {
  return form.querySelector(":invalid");
}

/** A field's name as the form shows it. */
export function labelOf(field) {
  return field.labels[0].firstChild.textContent.trim();
}

export function setUpSettings() {
  fill(kept());
  form.addEventListener("input", () => {
    keepSettings({ ...kept(), ...settings() });
    showTheme();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => {
    fill({});
    keepSettings({});
  });
}

function fill(values) {
  for (const field of form.elements) {
    if (field.type === "radio") field.checked = field.value === (values[field.name] ?? "");
    else if (field.name) field.value = values[field.name] ?? "";
  }
  showTheme();
}

/**
 * Leaves the switch away where a model's card says that its template has none. A card without
 * that line is of a model that is not loaded.
 */
export function showThinking({ chat_template_kwargs: names = ["enable_thinking"] }) {
  const known = names.includes("enable_thinking") || names.includes("thinking");
  byId("thinking").hidden = byId("thinking").disabled = !known;
}

function showTheme() {
  document.documentElement.dataset.theme = settings().theme;
}

/** How to reach this server from elsewhere, with the chosen model. */
export function showUse(model) {
  const base = new URL("v1", document.baseURI).href;
  const message = { role: "user", content: "Hello!" };
  const body = JSON.stringify({ model, messages: [message] }).replaceAll("'", "'\\''");
  const headers = ["'Content-Type: application/json'"];
  if (hasKey()) headers.push('"Authorization: Bearer $QUIRE_API_KEY"'); // Quoted for the shell.
  const parts = [...headers.map((header) => `-H ${header}`), `-d '${body}'`];
  const curl = [`curl ${base}/chat/completions`, ...parts].join(" \\\n  ");
  for (const [id, text] of Object.entries({ "base-url": base, curl })) {
    const pre = byId(id);
    pre.textContent = text;
    const head = el("div", { class: "code-head" }, el("span"), copyButton(() => text));
    pre.parentElement.replaceChildren(head, pre);
  }
}
