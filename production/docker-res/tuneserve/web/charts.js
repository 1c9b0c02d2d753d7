// Small charts as SVG. Each has words for who does not see it, and colours from the style sheet.

import { h } from "./dom.js";

const WIDTH = 560;
const HEIGHT = 180;
const EDGE = { left: 56, right: 8, top: 12, bottom: 26 };

// Curves over steps: [{name, kind, points: [[step, value], ...]}].
export function lineChart(curves, { steps, title }) {
  const points = curves.flatMap((curve) => curve.points);
  if (points.length < 2) return h("p", { class: "note" }, "The curve begins with the second figure.");
  const most = rounded(Math.max(...points.map(([, value]) => value), 0.01));
  const last = Math.max(steps || 0, ...points.map(([step]) => step), 1);
  const x = (step) => EDGE.left + (step / last) * (WIDTH - EDGE.left - EDGE.right);
  const y = (value) => EDGE.top + (1 - value / most) * (HEIGHT - EDGE.top - EDGE.bottom);
  const rules = [0, most / 2, most].map((value) => [
    h("line", { class: "rule", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }),
    h("text", { class: "tick", x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)),
  ]);
  const drawn = curves
    .filter((curve) => curve.points.length)
    .map((curve) => [
      h("path", {
        class: `curve ${curve.kind}`,
        d: curve.points.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join(""),
      }),
      curve.kind === "marked" && curve.points.map(([step, value]) => h("circle", { class: "mark", cx: x(step), cy: y(value), r: 4 })),
    ]);
  const now = curves
    .filter((curve) => curve.points.length)
    .map((curve) => `${curve.name} ${curve.points.at(-1)[1].toFixed(3)}`);
  return h(
    "figure",
    {},
    h(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title}: ${now.join(", ")}` },
      rules,
      h("text", { class: "tick", x: WIDTH - EDGE.right, y: HEIGHT - 6, "text-anchor": "end" }, `step ${last}`),
      drawn,
    ),
    h("figcaption", {}, now.map((words, index) => h("span", { class: `legend ${curves[index].kind}` }, words))),
  );
}

// The next figure of two digits, the second of which is 0 or 5.
function rounded(value) {
  const unit = 10 ** Math.floor(Math.log10(value)) / 2;
  return Math.ceil(value / unit) * unit;
}

// A bar that holds a share of `most`, with a mark at `bound` and a shade over `range`, if these are there.
export function bar(share, { kind = "", bound, range, most = 1 } = {}) {
  const width = (value) => `${Math.min(100, Math.max(0, (100 * value) / most)).toFixed(1)}%`;
  return h(
    "span",
    { class: `bar ${kind}`, "aria-hidden": "true" },
    h("span", { class: "filled", style: { width: width(share) } }),
    range && h("span", { class: "range", style: { left: width(range[0]), width: width(range[1] - range[0]) } }),
    bound !== undefined && h("span", { class: "bound", style: { left: width(bound) } }),
  );
}

// The last values as a line without axes.
export function spark(values, label) {
  const most = Math.max(...values, 0.001);
  const step = 120 / Math.max(1, values.length - 1);
  const d = values.map((value, index) => `${index ? "L" : "M"}${(index * step).toFixed(1)} ${(26 - (24 * value) / most).toFixed(1)}`).join("");
  return h("svg", { class: "spark", viewBox: "0 0 120 28", role: "img", "aria-label": label }, h("path", { class: "curve", d }));
}
