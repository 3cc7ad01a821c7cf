// Lines over the last minutes, by uPlot. Colours come from the style sheet, so that both themes are right.

import { setText } from "./dom.js";

const HEIGHT_PX = 92;
const KEPT_S = 300;
const FIRST_S = 60; // a page that was just opened does not look empty

const charts = new Set();

const colours = new Map(); // as the present theme has them
const probe = document.createElement("i"); // a canvas knows no variables, so an element works them out
probe.hidden = true;
document.body.append(probe);

function colour(name) {
  if (!colours.has(name)) {
    probe.style.color = `var(${name})`;
    colours.set(name, getComputedStyle(probe).color);
  }
  return colours.get(name);
}

/** `series`: [{ label, colour: "--accent", shown: (value) => text, scale, fill }]. Time is in seconds. */
export function chart(holder, reading, series) {
  const data = [[], ...series.map(() => [])];
  let seen = null; // the index that is pointed at
  const plot = new uPlot({
    width: Math.max(80, holder.clientWidth),
    height: HEIGHT_PX,
    padding: [6, 4, 0, 4],
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 5 } },
    scales: scales(series),
    axes: [
      { show: true, size: 18, space: 60, incrs: [60, 120, 300], font: "11px system-ui", stroke: () => colour("--muted"), grid: { show: false }, ticks: { show: false }, values: (_, at) => at.map(minute) },
      { size: 0, space: 34, scale: series[0].scale ?? "y", ticks: { show: false }, values: () => [], grid: { width: 1, stroke: () => colour("--line") } },
    ],
    series: [{}, ...series.map((one) => ({
      scale: one.scale ?? "y", width: 1.75, points: { show: Boolean(one.dots), size: 5, fill: () => colour(one.colour) }, spanGaps: true,
      stroke: () => colour(one.colour), fill: one.fill ? () => colour(one.fill) : undefined,
    }))],
    hooks: { setCursor: [(self) => { seen = self.cursor.idx ?? null; say(); }] },
  }, data, holder);
  plot.root.setAttribute("aria-hidden", "true"); // the line above says its newest values

  function say() {
    const at = seen ?? data[0].length - 1;
    setText(reading, series.map((one, i) => `${one.label} ${one.shown(data[i + 1][at] ?? null)}`).join(" · "));
  }

  function push(atS, values) {
    data[0].push(atS);
    values.forEach((value, i) => data[i + 1].push(value));
    while (data[0][0] < atS - KEPT_S) data.forEach((column) => column.shift());
    if (holder.clientWidth) plot.setData(data); // not while its view is folded away
    say();
  }

  new ResizeObserver(() => holder.clientWidth && plot.setSize({ width: holder.clientWidth, height: HEIGHT_PX })).observe(holder);
  charts.add(plot);
  return { push, values: () => data };
}

function scales(series) {
  const range = (_, __, max) => [0, max > 0 ? max * 1.12 : 1];
  const newest = (_, min, max) => [(max ?? 0) - Math.max(FIRST_S, (max ?? 0) - (min ?? 0)), max ?? 0];
  return Object.fromEntries([["x", { time: true, range: newest }], ...series.map((one) => [one.scale ?? "y", { range }])]);
}

function minute(atS) {
  const at = new Date(atS * 1000);
  return `${at.getHours()}:${String(at.getMinutes()).padStart(2, "0")}`;
}

/** After a change of theme. */
export function redraw() {
  colours.clear();
  for (const plot of charts) plot.redraw(false);
}
