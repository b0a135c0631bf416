// SPDX-License-Identifier: Apache-2.0
// The routes under /v1/merge, with the keys of this tab.

const BASE = new URL("../v1/merge/", document.baseURI);
const KEYS = { api: "vllm-merge.api-key", admin: "vllm-merge.admin-token" };

export const key = (kind) => sessionStorage.getItem(KEYS[kind]) ?? "";
export const hasAdmin = () => key("admin") !== "";

export function setKeys(api, admin) {
  for (const [kind, value] of [["api", api], ["admin", admin]]) {
    if (value) sessionStorage.setItem(KEYS[kind], value);
    else sessionStorage.removeItem(KEYS[kind]);
  }
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers(more = {}) {
  const found = { ...more };
  if (key("api")) found.authorization = `Bearer ${key("api")}`;
  if (key("admin")) found["x-vllm-merge-admin-token"] = key("admin");
  return found;
}

export async function call(path, method = "GET", body = undefined) {
  const sent = body === undefined ? undefined : JSON.stringify(body);
  const more = sent === undefined ? {} : { "content-type": "application/json" };
  const answer = await fetch(new URL(path, BASE), { method, headers: headers(more), body: sent, cache: "no-store" });
  const found = await answer.json().catch(() => null);
  if (!answer.ok) {
    const said = found?.error?.message ?? found?.error ?? found?.detail;
    throw new Refused(answer.status, typeof said === "string" ? said : `${method} ${path}: ${answer.status}`);
  }
  return found;
}

// Server-sent events by fetch, because EventSource sends no headers. Ends when the connection does.
export async function follow(onEvent, signal) {
  const answer = await fetch(new URL("events", BASE), { headers: headers(), signal, cache: "no-store" });
  if (!answer.ok) throw new Refused(answer.status, `events: ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    let end;
    while ((end = waiting.indexOf("\n\n")) >= 0) {
      const fields = {};
      for (const line of waiting.slice(0, end).split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      waiting = waiting.slice(end + 2);
      if (fields.event) onEvent(fields.event, JSON.parse(fields.data ?? "{}"));
    }
  }
}
