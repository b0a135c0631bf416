// SPDX-License-Identifier: Apache-2.0
// Shows what is served, again whenever the server tells of a change.

import { follow, key, Refused, setKeys } from "./api.js";
import { content, el } from "./elements.js";
import { showExperiments } from "./experiments.js";
import { showNames, showWorkers } from "./server.js";

const EVENTS_SHOWN = 100;
const SLOW = 10_000, FAST = 1_000, SOON = 150; // ms between two looks: idle, while merges run, after an event
const by = (id) => document.getElementById(id);

let timer = null, looking = false, again = false;

function say(problem) {
  by("problem").hidden = !problem;
  by("problem").textContent = problem;
}

function status(text, tone = "quiet") {
  by("status").textContent = text;
  by("status").className = tone;
}

// Ask if there is something to ask, do it, and show what became of it.
async function act({ title, text, reason = false, run }) {
  if (title) {
    const said = await confirmed(title, text, reason);
    if (said === null) return;
    await tried(() => run(said));
  } else {
    await tried(run);
  }
}

async function tried(run) {
  try {
    await run();
    say("");
  } catch (error) {
    say(error instanceof Refused ? error.message : `The server cannot be reached: ${error.message}`);
  }
  await look();
}

function confirmed(title, text, reason) {
  const dialog = by("confirm-dialog");
  by("confirm-title").textContent = title;
  by("confirm-text").textContent = text;
  by("confirm-label").hidden = !reason;
  by("confirm-reason").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes" ? by("confirm-reason").value : null);
    }, { once: true });
  });
}

async function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  clearTimeout(timer);
  let next = SLOW;
  try {
    const [busy, generation] = await Promise.all([showWorkers(act), showNames(act), showExperiments(act)]);
    status(`generation ${generation}, ${new Date().toLocaleTimeString()}`, "good");
    if (busy) next = FAST;
  } catch (error) {
    if (error instanceof Refused && error.status === 401) status("the API key is missing or wrong: press Keys", "bad");
    else status(error instanceof Refused ? error.message : "the server cannot be reached", "bad");
  }
  looking = false;
  if (again) next = SOON;
  again = false;
  timer = setTimeout(look, next);
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(look, SOON);
}

function note(kind, data) {
  const list = content("events");
  const words = Object.entries(data).filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => `${name} ${typeof value === "object" ? JSON.stringify(value) : value}`);
  list.prepend(el("li", {}, `${new Date().toLocaleTimeString()} ${kind}: ${words.join(", ")}`));
  while (list.children.length > EVENTS_SHOWN) list.lastElementChild.remove();
}

let listening = new AbortController();

async function listen() {
  const mine = listening;
  while (!mine.signal.aborted) {
    try {
      await follow((kind, data) => { note(kind, data); soon(); }, mine.signal);
    } catch { /* the next look says what is wrong */ }
    if (!mine.signal.aborted) await new Promise((resolve) => { setTimeout(resolve, SLOW / 2); });
  }
}

function begin() {
  listening.abort();
  listening = new AbortController();
  look();
  listen();
}

by("keys").addEventListener("click", () => {
  by("api-key").value = key("api");
  by("admin-token").value = key("admin");
  by("key-dialog").showModal();
});
for (const [id, api, admin] of [["use-keys", () => by("api-key").value, () => by("admin-token").value], ["forget-keys", () => "", () => ""]]) {
  by(id).addEventListener("click", () => {
    setKeys(api(), admin());
    by("key-dialog").close();
    begin();
  });
}
by("confirm-yes").addEventListener("click", () => by("confirm-dialog").close("yes"));
by("confirm-no").addEventListener("click", () => by("confirm-dialog").close(""));
for (const id of ["api-key", "admin-token", "confirm-reason"]) {
  by(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault(); // else it would press the button that gets the focus back
    by(id === "confirm-reason" ? "confirm-yes" : "use-keys").click();
  });
}
begin();
