// The server's /metrics, read into figures a person can watch.

import { request } from "./api.js";

const WINDOW = 60; // seconds of history that the curve shows
const INTERVAL = 1000; // milliseconds between two readings
const INTERVAL_OF_FAILURES = 3000;
const SMOOTHING = 3; // seconds over which a rate is taken

/** [{name, labels, value}] of a Prometheus text exposition. */
export function parseExposition(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const match = line.match(/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    samples.push({ name: match[1], labels, value: Number(match[3]) });
  }
  return samples;
}

/** One reading of /metrics, summed over the models that run. */
class Reading {
  constructor(samples, time) {
    this.time = time; // seconds
    this.samples = samples;
  }

  total(name, where = {}) {
    const matches = (labels) => Object.entries(where).every(([k, v]) => labels[k] === v);
    const found = this.samples.filter((s) => s.name === `quire_${name}` && matches(s.labels));
    return found.length ? found.reduce((sum, s) => sum + s.value, 0) : null;
  }

  byLabel(name, label) {
    const values = {};
    for (const s of this.samples.filter((s) => s.name === `quire_${name}` && label in s.labels)) {
      values[s.labels[label]] = (values[s.labels[label]] ?? 0) + s.value;
    }
    return values;
  }
}

/** Reads /metrics once a second while the page is seen, and calls `show` with the figures. */
export class MetricsPoll {
  constructor(show) {
    this.show = show;
    this.readings = [];
    this.firstToken = null; // seconds; the mean of the last interval in which a request began
    document.addEventListener("visibilitychange", () => this.wake());
    this.wake();
  }

  wake() {
    clearTimeout(this.timer);
    if (!document.hidden) this.poll();
  }

  async poll() {
    clearTimeout(this.timer);
    let pause = INTERVAL;
    try {
      const response = await request("metrics", { background: true, cache: "no-store" });
      const samples = parseExposition(await response.text());
      this.add(new Reading(samples, performance.now() / 1000));
      this.show(this.figures());
    } catch (error) {
      this.readings = [];
      pause = INTERVAL_OF_FAILURES;
      this.show({ state: error.status === 401 ? "asks for an API key" : "not reachable" });
    }
    if (!document.hidden) this.timer = setTimeout(() => this.poll(), pause);
  }

  add(reading) {
    const last = this.readings.at(-1);
    const lastCount = last?.total("generated_tokens_total") ?? 0;
    if (reading.total("generated_tokens_total") < lastCount) this.readings = []; // Restarted.
    this.readings.push(reading);
    while (reading.time - this.readings[0].time > WINDOW + SMOOTHING) this.readings.shift();
    const began = this.change("time_to_first_token_seconds_count", last, reading);
    if (began > 0) {
      this.firstToken = this.change("time_to_first_token_seconds_sum", last, reading) / began;
    }
  }

  change(name, from, to) {
    return from ? (to.total(name) ?? 0) - (from.total(name) ?? 0) : 0;
  }

  /** [age in seconds, tokens/s], the oldest first. */
  rates() {
    const now = this.readings.at(-1).time;
    return this.readings.slice(1).map((reading, i) => {
      const from = this.readings.find((r) => reading.time - r.time <= SMOOTHING) ?? reading;
      const before = from === reading ? this.readings[i] : from;
      const tokens = this.change("generated_tokens_total", before, reading);
      return [now - reading.time, tokens / (reading.time - before.time)];
    });
  }

  figures() {
    const now = this.readings.at(-1);
    const rates = this.rates();
    const hits = now.total("prefix_cache_hit_tokens_total");
    const queries = now.total("prefix_cache_query_tokens_total");
    return {
      state: now.total("model_ready") ? "ready" : "loading",
      rates,
      window: WINDOW,
      tokensPerSecond: rates.at(-1)?.[1] ?? 0,
      firstToken: this.firstToken,
      running: now.total("requests_running"),
      waiting: now.total("requests_waiting"),
      cached: queries ? hits / queries : null,
      blocks: now.byLabel("kv_blocks", "state"),
      memory: now.byLabel("memory_bytes", "kind"),
    };
  }
}
