// SPDX-License-Identifier: Apache-2.0
// A card for every experiment: verdict, arms, effect over time, guardrails, decisions; promote and stop.

import { call, hasAdmin, Refused } from "./api.js";
import { button, content, el, figure, number, replace, share, table, time } from "./elements.js";
import { plot } from "./plot.js";

const COLOURS = 6;
const settled = { running: "good", promoted: "good", stopped: "warn" };

function colours(report) {
  return Object.fromEntries(report.arms.map((arm, index) => [arm.arm, index % COLOURS]));
}

function interval(found) {
  return found.low === null || found.high === null ? "" : ` (${figure(found.low)} to ${figure(found.high)})`;
}

function effect(report, arm) {
  const found = report.primary?.differences.find((difference) => difference.arm === arm);
  if (!found) return "";
  const tone = { better: "good", worse: "bad" }[found.state] ?? "quiet";
  return el("span", { class: tone }, `${figure(found.difference)}${interval(found)} ${found.state}`);
}

function arms(row, report) {
  const known = report ? Object.fromEntries(report.arms.map((arm) => [arm.arm, arm])) : {};
  return table(`Arms of ${row.experiment}`, [
    ["Arm", (arm) => (arm.arm === row.control ? `${arm.arm} (control)` : arm.arm), "name"],
    ["Serves", (arm) => arm.artifact ?? arm.serves, "name"],
    ["Share", (arm) => share(arm.weight), "number"],
    ["Units", (arm) => number(known[arm.arm]?.units), "number"],
    ["Requests", (arm) => number(known[arm.arm]?.requests), "number"],
    ["Errors", (arm) => number(known[arm.arm]?.errors), "number"],
    [report?.primary ? `${report.primary.metric} − control` : "Effect", (arm) => report && effect(report, arm.arm)],
    ["State", (arm) => {
      const why = arm.failed ?? arm.withdrawn;
      return why ? el("span", { class: "bad" }, why) : "";
    }],
  ], row.arms, "no arms");
}

function pairs(report) {
  return (report?.paired ?? []).map((both) => {
    const lost = Object.values(both.dropped).reduce((sum, count) => sum + count, 0);
    const dropped = lost ? `, ${number(lost)} dropped` : "";
    return table(`${both.control} and ${both.arm} on the same requests: ${number(both.pairs)} pairs${dropped}`, [
      ["Of pairs", (found) => (found.difference ? `${found.metric}, ${both.arm} − ${both.control}` : found.metric), "name"],
      ["Mean", (found) => `${figure(found.value)}${interval(found)}`, "number"],
    ], both.values.filter((found) => found.value !== null), "no pairs yet");
  });
}

function guardrails(report) {
  if (!report?.guardrails?.length) return null;
  return table("Guardrails", [
    ["Guardrail", (check) => check.guardrail, "name"],
    ["Arm", (check) => check.arm],
    ["State", (check) => el("span", { class: { broken: "bad", kept: "good" }[check.state] ?? "quiet" }, check.state)],
    ["What was seen", (check) => check.sentence, "name"],
  ], report.guardrails, "");
}

function decisions(row) {
  if (!row.decisions.length) return null;
  const lines = row.decisions.map((made) =>
    el("li", {}, `${time(made.at)}: ${made.kind}${made.arm ? ` ${made.arm}` : ""}${made.reason ? `: ${made.reason}` : ""}`));
  return el("div", {}, el("h4", {}, "Decisions"), el("ul", {}, lines));
}

function controls(row, act) {
  if (!hasAdmin()) return null;
  const choice = el("select", { "data-key": `arm-${row.experiment}`, "aria-label": `Arm of ${row.experiment} to promote` },
    row.arms.map((arm) => el("option", { value: arm.arm }, arm.arm)));
  const path = `experiments/${encodeURIComponent(row.experiment)}`;
  const left = row.alias && row.status === "promoted" ? ` The alias ${row.alias} stays where the promotion moved it.` : "";
  return el("p", { class: "buttons" }, choice,
    button("Promote", `promote-${row.experiment}`, () => act({
      title: `Promote ${choice.value}?`, reason: true,
      text: `Everybody who asks for ${row.alias ?? row.experiment} gets ${choice.value}.`,
      run: (reason) => call(`${path}/promote`, "POST", { arm: choice.value, reason }),
    }), true),
    button("Stop", `stop-${row.experiment}`, () => act({
      title: `Stop ${row.experiment}?`, reason: true, text: `Everybody who asks for ${row.experiment} gets ${row.control}.${left}`,
      run: (reason) => call(`${path}/stop`, "POST", { reason }),
    })));
}

async function reportOf(row) {
  try {
    return await call(`experiments/${encodeURIComponent(row.experiment)}/report`);
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return null; // nothing was stored yet
    throw error;
  }
}

export async function showExperiments(act) {
  const { data } = await call("experiments");
  const place = content("experiments");
  if (!data.length) return replace(place, el("p", { class: "quiet" }, "The recipe file has no experiment."));
  const cards = await Promise.all(data.map(async (row) => {
    const report = await reportOf(row);
    const title = report?.primary ? `${report.primary.metric}: difference from ${row.control}, with its interval` : "";
    return el("article", { class: "card", "aria-label": `Experiment ${row.experiment}` },
      el("header", {}, el("h3", {}, row.experiment), el("p", { class: settled[row.status] ?? "quiet" }, row.status)),
      report ? el("p", { class: "verdict" }, report.verdict.sentence) : null,
      arms(row, report),
      report ? plot(title, report.course, colours(report)) : null,
      pairs(report), guardrails(report), decisions(row), controls(row, act));
  }));
  replace(place, ...cards);
}
