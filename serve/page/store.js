// What this browser keeps: one entry per conversation, so that two tabs do not overwrite each
// other, and one for the settings.

const CHAT = "quire.chat.";
const SETTINGS = "quire.settings";

export function newConversation() {
  return { id: crypto.randomUUID?.() ?? String(Date.now()) + Math.random(), updated: 0, turns: [] };
}

/** Every kept conversation, the latest first. */
export function conversations() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(CHAT));
  const kept = keys.map((key) => parsed(localStorage.getItem(key))).filter(isConversation);
  return kept.sort((a, b) => b.updated - a.updated);
}

/** False if the browser has no room left. */
export function keep(conversation) {
  conversation.updated = Date.now();
  return write(CHAT + conversation.id, conversation);
}

export function forget(id) {
  localStorage.removeItem(CHAT + id);
}

export function settings() {
  return parsed(localStorage.getItem(SETTINGS)) ?? {};
}

export function keepSettings(values) {
  write(SETTINGS, values);
}

/** Adds the conversations of an exported file; returns how many it held. Throws if it is none. */
export function importAll(text) {
  const found = JSON.parse(text).filter(isConversation);
  for (const conversation of found) write(CHAT + conversation.id, conversation);
  return found.length;
}

export function title(conversation) {
  const first = conversation.turns.find((turn) => turn.role === "user");
  return first ? first.content.trim().split("\n")[0].slice(0, 80) : "New conversation";
}

function isConversation(value) {
  return (
    typeof value?.id === "string" &&
    typeof value.updated === "number" &&
    Array.isArray(value.turns) &&
    value.turns.every((turn) => typeof turn?.role === "string" && typeof turn.content === "string")
  );
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // Not written by this page.
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
