// SPDX-License-Identifier: Apache-2.0
// Names with their aliases, what every worker holds by tier, and the merges that run.

import { call, hasAdmin } from "./api.js";
import { button, bytes, content, el, number, replace, seconds, table, time } from "./elements.js";

const tones = { ready: "good", preparing: "warn", failed: "bad", cold: "quiet" };
const at = (...parts) => parts.map(encodeURIComponent).join("/");

function moving(alias, targets, act) {
  if (!hasAdmin()) return null;
  const options = targets.map((name) => el("option", { value: name, selected: name === alias.target }, name));
  const choice = el("select", { "data-key": `target-${alias.alias}`, "aria-label": `What ${alias.alias} stands for` }, options);
  return el("span", { class: "buttons" }, choice,
    button("Move", `move-${alias.alias}`, () => act({
      title: `Move ${alias.alias} to ${choice.value}?`,
      text: "New requests get it as soon as every process has it; requests that run keep what they have.",
      run: () => call(at("aliases", alias.alias), "POST", { target: choice.value }),
    }), true),
    alias.before ? button(`Back to ${alias.before}`, `back-${alias.alias}`, () => act({
      title: `Move ${alias.alias} back to ${alias.before}?`, text: "As it was before its last move.",
      run: () => call(`${at("aliases", alias.alias)}/back`, "POST"),
    })) : null);
}

export async function showNames(act) {
  const [names, aliases] = await Promise.all([call("recipes"), call("aliases")]);
  const moved = Object.fromEntries(aliases.data.map((alias) => [alias.alias, alias]));
  const targets = names.data.filter((row) => row.kind === "recipe" || row.kind === "adapter").map((row) => row.name);
  const shown = table("What each model name stands for", [
    ["Name", (row) => row.name, "name"],
    ["Kind", (row) => row.kind],
    ["Stands for", (row) => (moved[row.name] ? `${moved[row.name].target}: ${row.artifact ?? ""}` : row.artifact ?? ""), "name"],
    ["State", (row) => el("span", { class: tones[row.state] ?? "quiet" }, row.state, row.reason ? `: ${row.reason}` : "")],
    ["Rank", (row) => row.rank ?? "", "number"],
    ["Size", (row) => bytes(row.bytes), "number"],
    ["", (row) => moved[row.name] && moving(moved[row.name], targets, act)],
  ], names.data, "The recipe file has no names.");
  const error = names.file.error ? el("p", { class: "bad" }, `A newer recipe file is not served: ${names.file.error}`) : null;
  replace(content("names"), ...[error, shown].filter(Boolean));
  return names.file.generation;
}

function steering(row, act) {
  if (!hasAdmin() || row.tier !== "cache") return null;
  const run = (what) => () => act({ run: () => call(`${at("artifacts", row.digest)}/${what}`, "POST") });
  return el("span", { class: "buttons" },
    button(row.pinned ? "Unpin" : "Pin", `pin-${row.digest}`, run(row.pinned ? "unpin" : "pin")),
    button("Evict", `evict-${row.digest}`, run("evict")));
}

function usage(what, used, budget) {
  const label = `${what}: ${bytes(used)} of ${bytes(budget)}`;
  return el("p", {}, label, el("progress", { max: Math.max(budget, 1), value: Math.min(used, budget), "aria-label": label }));
}

function held(worker, index, act) {
  if (worker.error) return el("p", { class: "bad" }, `worker ${index}: ${worker.error}`);
  const slots = new Map(Object.entries(worker.slots ?? {}).map(([slot, digest]) => [digest, slot]));
  const rows = [...worker.artifacts, ...(worker.host?.artifacts ?? []).map((row) => ({ tier: "host", ...row }))];
  return el("div", { class: "card" },
    el("h3", {}, `Worker ${index}`),
    usage("GPU cache", worker.bytes ?? 0, worker.budget_bytes ?? 0),
    worker.host ? usage("Host memory", worker.host.bytes, worker.host.budget_bytes) : null,
    worker.disk ? el("p", { class: "quiet" }, `Disk: ${bytes(worker.disk.bytes)}`) : null,
    table(`Artifacts of worker ${index}`, [
      ["Artifact", (row) => row.name ?? row.digest.slice(0, 12), "name"],
      ["Tier", (row) => (slots.has(row.digest) ? `slot ${slots.get(row.digest)}` : row.tier)],
      ["Rank", (row) => row.rank ?? "", "number"],
      ["Size", (row) => bytes(row.bytes), "number"],
      ["Leases", (row) => row.leases ?? "", "number"],
      ["Merged in", (row) => seconds(row.seconds), "number"],
      ["Last used", (row) => (row.last_used ? time(row.last_used) : "")],
      ["", (row) => steering(row, act)],
    ], rows, "Nothing is in memory."));
}

function merging(worker, index, act) {
  return (worker.merging ?? []).map((job) => el("div", { class: "card" },
    el("h3", {}, job.name), el("p", { class: "quiet" }, `worker ${index}, ${job.status}, ${number(job.done)} of ${number(job.total)} modules`),
    el("progress", { max: Math.max(job.total, 1), value: job.done, "aria-label": `Merge of ${job.name}` }),
    hasAdmin() ? el("p", { class: "buttons" }, button("Cancel", `cancel-${index}-${job.digest}`, () => act({
      title: `Stop the merge of ${job.name}?`, text: "Requests that wait for it get a 503.",
      run: () => call(at("merges", job.digest), "DELETE"),
    }))) : null));
}

// Returns whether anything is being merged.
export async function showWorkers(act) {
  const { data } = await call("artifacts");
  replace(content("artifacts"), ...data.map((worker, index) => held(worker, index, act)));
  const running = data.flatMap((worker, index) => merging(worker, index, act));
  replace(content("merges"), ...(running.length ? running : [el("p", { class: "quiet" }, "Nothing is being merged.")]));
  return running.length > 0;
}
