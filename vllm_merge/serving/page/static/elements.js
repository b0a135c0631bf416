// SPDX-License-Identifier: Apache-2.0
// Elements, tables and numbers. Text from the server is set as text, never as HTML.

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export const content = (name) => document.querySelector(`[data-content="${name}"]`);

// columns: [title, row => text or node, class]. An empty list of rows gives the sentence `nothing`.
export function table(caption, columns, rows, nothing) {
  if (!rows.length) return el("p", { class: "quiet" }, nothing);
  const head = el("tr", {}, columns.map(([title, , kind]) => el("th", { scope: "col", class: kind }, title)));
  const body = rows.map((row) =>
    el("tr", {}, columns.map(([title, value, kind]) => {
      const found = value(row);
      return el("td", { class: kind, "data-label": title }, found ?? "");
    })),
  );
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", { class: "stack" }, el("caption", {}, caption), el("thead", {}, head), el("tbody", {}, body)));
}

let pressing = false; // between the press of a mouse button and its click
addEventListener("pointerdown", () => { pressing = true; }, true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { setTimeout(() => { pressing = false; }); }, true);
addEventListener("change", (event) => { event.target.dataset.chosen = "yes"; }, true);

// Put `fresh` where `place`'s content was, unless somebody is at it. What was chosen stays chosen, the focus where it was.
export function replace(place, ...fresh) {
  const active = document.activeElement;
  if (pressing || (place.contains(active) && active.matches("select, input"))) return;
  const focused = place.contains(active) ? active.getAttribute("data-key") : null;
  const chosen = [...place.querySelectorAll("select[data-chosen]")].map((choice) => [choice.dataset.key, choice.value]);
  place.replaceChildren(...fresh);
  const at = (key) => place.querySelector(`[data-key="${CSS.escape(key)}"]`);
  for (const [key, value] of chosen) {
    const choice = at(key);
    if (choice && [...choice.options].some((option) => option.value === value)) {
      choice.value = value;
      choice.dataset.chosen = "yes";
    }
  }
  if (focused) at(focused)?.focus();
}

export function button(label, key, action, first = false) {
  return el("button", {
    type: "button", "data-key": key, class: first ? "first" : null,
    onclick: async (event) => {
      const pressed = event.currentTarget;
      pressed.disabled = true;
      await action().finally(() => { pressed.disabled = false; });
    },
  }, label);
}

export function bytes(count) {
  if (count === null || count === undefined) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0, value = count;
  while (value >= 1024 && index < units.length - 1) { value /= 1024; index += 1; }
  return `${value >= 100 || index === 0 ? Math.round(value) : value.toFixed(1)} ${units[index]}`;
}

export const seconds = (value) => (value === null || value === undefined ? "" : `${Number(value).toPrecision(3)} s`);
export const number = (value) => (value === null || value === undefined ? "–" : Number(value).toLocaleString("en"));
export const share = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
export const time = (at) => new Date(1000 * at).toLocaleString();

export function figure(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : Number(value.toPrecision(3)).toString();
}
