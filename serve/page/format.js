// Numbers as people read them.

export function count(value) {
  const digits = value < 10 && value % 1 ? 1 : 0;
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

export function bytes(value) {
  if (value < 2 ** 20) return `${Math.round(value / 2 ** 10)} KiB`;
  if (value < 2 ** 30) return `${(value / 2 ** 20).toPrecision(3)} MiB`;
  return `${(value / 2 ** 30).toPrecision(3)} GiB`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.max(Math.round(value * 1000), 1)} ms`;
  return `${value.toFixed(value < 10 ? 1 : 0)} s`;
}
