// SPDX-License-Identifier: Apache-2.0
// The effect of each arm with its interval over time, as SVG.

import { el, figure } from "./elements.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 240, LEFT = 64, RIGHT = 12, TOP = 10, BOTTOM = 26;
const MOST = 720, LEAST = 280, AROUND = 70; // widths, so that text is as large on a phone

function svg(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function runs(line) {
  const found = [[]];
  line.at.forEach((at, i) => {
    if ([line.difference[i], line.low[i], line.high[i]].some((value) => value === null)) found.push([]);
    else found.at(-1).push({ at, y: line.difference[i], low: line.low[i], high: line.high[i] });
  });
  return found.filter((run) => run.length);
}

// lines: [{arm, at, difference, low, high}], colour: {arm: its number}. Null where nothing can be drawn yet.
export function plot(title, lines, colour) {
  const drawn = lines.map((line) => ({ arm: line.arm, runs: runs(line) })).filter((line) => line.runs.length);
  if (!drawn.length) return null;
  const points = drawn.flatMap((line) => line.runs.flat());
  // The first intervals are so wide that nothing else would be seen: the later half decides the height.
  const width = Math.min(MOST, Math.max(LEAST, window.innerWidth - AROUND));
  const times = points.map((point) => point.at);
  const from = Math.min(...times), last = Math.max(...times), to = Math.max(last, from + 1);
  const late = points.filter((point) => point.at >= (from + last) / 2);
  let low = Math.min(0, ...late.map((p) => p.low)), high = Math.max(0, ...late.map((p) => p.high));
  if (low === high) high = low + 1;
  const pad = 0.08 * (high - low);
  low -= pad; high += pad;
  const x = (at) => LEFT + ((at - from) / (to - from)) * (width - LEFT - RIGHT);
  const y = (value) => TOP + ((high - Math.min(Math.max(value, low), high)) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": title });
  for (const value of [low + pad, 0, high - pad]) {
    const at = y(value);
    picture.append(svg("line", { class: value === 0 ? "zero" : "axis", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    picture.append(svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, figure(value)));
  }
  for (const [at, anchor] of [[from, "start"], [to, "end"]]) {
    const moment = new Date(1000 * at);
    const text = width < MOST ? moment.toLocaleTimeString() : moment.toLocaleString();
    picture.append(svg("text", { x: x(at), y: HEIGHT - 8, "text-anchor": anchor }, text));
  }
  for (const line of drawn) {
    for (const run of line.runs) {
      const there = run.map((p) => `${x(p.at).toFixed(1)},${y(p.high).toFixed(1)}`);
      const back = run.map((p) => `${x(p.at).toFixed(1)},${y(p.low).toFixed(1)}`).reverse();
      picture.append(svg("polygon", { class: `band arm-${colour[line.arm]}`, points: [...there, ...back].join(" ") }));
      const middle = run.map((p) => `${x(p.at).toFixed(1)},${y(p.y).toFixed(1)}`).join(" ");
      picture.append(svg("polyline", { class: `line arm-${colour[line.arm]}`, points: middle }));
      if (run.length > 1) continue;
      const alone = { class: `line arm-${colour[line.arm]}`, x1: x(run[0].at), x2: x(run[0].at) };
      picture.append(svg("line", { ...alone, y1: y(run[0].low), y2: y(run[0].high) }));
      picture.append(svg("circle", { class: `arm-${colour[line.arm]}`, cx: x(run[0].at), cy: y(run[0].y), r: 3 }));
    }
  }
  const key = drawn.map((line) => {
    const mark = svg("svg", { viewBox: "0 0 16 10", "aria-hidden": "true" });
    mark.append(svg("rect", { class: `arm-${colour[line.arm]}`, x: 0, y: 3, width: 16, height: 4 }));
    return el("li", {}, mark, line.arm);
  });
  return el("figure", { class: "quiet" }, el("figcaption", {}, title), picture, el("ul", { class: "key" }, key));
}
