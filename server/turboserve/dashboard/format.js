// Figures as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Three digits at most: `1.24 GB`, `87 kB`. Decimal units, as in the server's own lines. */
export function bytes(value) {
  let power = 0;
  while (Math.abs(value) >= 999.5 && power < UNITS.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${digits(value, power)}\u00a0${UNITS[power]}`; // no line ends between them
}

function digits(value, power) {
  if (!power || value >= 100) return value.toFixed(0);
  return value.toFixed(value >= 10 ? 1 : 2);
}

export const count = (value) => Math.round(value).toLocaleString("en");

/** `1 token`, `2 tokens`. */
export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export const ratio = (value) => `${value.toFixed(value >= 10 ? 0 : 1)}×`;

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 1 : 0)} s`;
}

export const percent = (share) => `${(share * 100).toFixed(share < 0.1 ? 1 : 0)}%`;

/** How long ago, in one word or two. */
export function ago(ms) {
  const s = ms / 1000;
  if (s < 60) return "just now";
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`;
  return `${Math.floor(s / 86400)} d ago`;
}
