// The figures beside the conversation.

import { el, svg } from "./dom.js";
import { bytes, count, seconds } from "./format.js";

const CURVE = { width: 240, height: 56 };

export class FiguresView {
  constructor(node) {
    this.rate = el("strong", {}, "0");
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    const curve = svg(
      "svg",
      {
        class: "curve",
        viewBox: `0 0 ${CURVE.width} ${CURVE.height}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": "Tokens per second in the last minute",
      },
      this.area,
      this.line,
    );
    this.cells = {};
    const names = { firstToken: "First token", running: "Running", waiting: "Waiting" };
    const cells = Object.entries({ ...names, cached: "From cache" }).map(([key, label]) => {
      this.cells[key] = el("dd", {}, "–");
      return el("div", {}, el("dt", {}, label), this.cells[key]);
    });
    this.blocks = new Bar("KV blocks", ["used", "cached", "free"]);
    this.memory = new Bar("Memory", ["weights", "KV cache", "other", "MLX cache"]);
    node.append(
      el("p", { class: "rate" }, this.rate, " tokens/s"),
      curve,
      el("dl", { class: "cells" }, ...cells),
      this.blocks.node,
      this.memory.node,
    );
  }

  show(figures) {
    if (!figures.rates) return;
    this.rate.textContent = count(figures.tokensPerSecond);
    this.drawCurve(figures);
    this.cells.firstToken.textContent = seconds(figures.firstToken);
    this.cells.running.textContent = figures.running ?? "–";
    this.cells.waiting.textContent = figures.waiting ?? "–";
    const cached = figures.cached;
    this.cells.cached.textContent = cached === null ? "–" : `${Math.round(cached * 100)}%`;
    const { used = 0, cached: kept = 0, free = 0 } = figures.blocks;
    this.blocks.show({ used, cached: kept, free }, count, `${count(used + kept + free)}`);
    this.showMemory(figures.memory);
  }

  showMemory({ weights = 0, kv_cache: pages = 0, active = 0, cache = 0, peak = 0 }) {
    const parts = { weights, "KV cache": pages, "MLX cache": cache };
    parts.other = Math.max(active - weights - pages, 0);
    this.memory.show(parts, bytes, peak ? `peak ${bytes(peak)}` : "");
  }

  drawCurve({ rates, window }) {
    const most = Math.max(10, ...rates.map(([, rate]) => rate)) * 1.1;
    const points = rates.map(([age, rate]) => {
      const x = CURVE.width * (1 - age / window);
      return `${x.toFixed(1)},${(CURVE.height - 1 - (rate / most) * (CURVE.height - 2)).toFixed(1)}`;
    });
    if (!points.length) return;
    const left = CURVE.width * (1 - rates[0][0] / window);
    this.line.setAttribute("d", `M${points.join("L")}`);
    this.area.setAttribute(
      "d",
      `M${left},${CURVE.height}L${points.join("L")}L${CURVE.width},${CURVE.height}Z`,
    );
  }
}

/** Parts of a whole, side by side, with a legend. */
class Bar {
  constructor(title, names) {
    this.note = el("span", { class: "note" });
    this.parts = new Map(
      names.map((name, i) => [name, { bar: el("i", { class: `part p${i}` }), label: el("span") }]),
    );
    const legend = names.map((name, i) => {
      const key = el("i", { class: `key p${i}` });
      return el("li", {}, key, `${name} `, this.parts.get(name).label);
    });
    this.node = el(
      "div",
      { class: "bar-figure" },
      el("p", { class: "bar-title" }, el("span", {}, title), this.note),
      el("div", { class: "parts" }, ...[...this.parts.values()].map((part) => part.bar)),
      el("ul", { class: "legend" }, ...legend),
    );
  }

  show(values, format, note) {
    this.note.textContent = note;
    for (const [name, { bar, label }] of this.parts) {
      bar.style.flexGrow = values[name];
      label.textContent = format(values[name]);
      label.parentElement.hidden = !values[name] && name !== "used" && name !== "cached";
    }
  }
}
