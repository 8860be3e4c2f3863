// The two side columns: beside the conversation where there is room, else over it.

import { byId } from "./dom.js";

/** Returns {close()}, which is true if something was open over the conversation. */
export function setUpLayout() {
  const buttons = [...document.querySelectorAll("[data-open]")];

  function show(id) {
    for (const button of buttons) {
      const open = button.dataset.open === id;
      byId(button.dataset.open).classList.toggle("shown", open);
      button.setAttribute("aria-expanded", open);
    }
    byId("shade").classList.toggle("shown", Boolean(id));
    if (id) byId(id).querySelector("button, input, textarea").focus();
  }

  function close() {
    const open = buttons.find((button) => button.getAttribute("aria-expanded") === "true");
    if (!open) return false;
    show(null);
    open.focus();
    return true;
  }

  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.open));
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", close);
  }
  byId("shade").addEventListener("click", close);
  return { close };
}
