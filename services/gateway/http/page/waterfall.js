// The last requests as bars: where the time of each went, and in words what bounded it.

import { count, duration, find, make, percent, sized } from "./dom.js";

const KINDS = {
  wait: "waiting",
  prefill: "prefill",
  handoff: "handoff",
  decode: "decode",
};
const KIND_OF = { prefill: "prefill", handoff: "handoff", join: "handoff", decode: "decode" };
const rows = new Map(); // by request id: an open one stays open

export function drawKinds() {
  const items = Object.entries(KINDS).map(([kind, name]) =>
    make("li", {}, make("span", { class: `swatch stage-${kind}`, "aria-hidden": "true" }), name),
  );
  find("kinds").replaceChildren(...items);
}

export function drawWaterfall(requests) {
  const box = find("waterfall");
  if (!requests.length) {
    box.replaceChildren(make("p", { class: "empty" }, "No request has ended yet."));
    return;
  }
  const most = Math.max(...requests.map((request) => request.total_ms || 0), 1);
  const shown = new Set(requests.map((request) => request.id));
  for (const id of [...rows.keys()]) if (!shown.has(id)) rows.delete(id);
  for (const request of requests) {
    if (!rows.has(request.id)) rows.set(request.id, row(request));
    sized(rows.get(request.id).querySelector(".bars"), { width: percent(request.total_ms || 0, most) });
  }
  const wanted = requests.map((request) => rows.get(request.id));
  const isSame = wanted.length === box.children.length && wanted.every((each, at) => box.children[at] === each);
  if (!isSame) box.replaceChildren(...wanted);
}

function row(request) {
  const stages = request.stages || [];
  const total = request.total_ms || 1;
  const bars = make("div", { class: "bars" });
  for (const stage of stages) {
    const kind = KIND_OF[stage.name] || "wait";
    const part = make("div", { class: `stage-${kind}` });
    bars.append(sized(part, { width: percent(stage.end_ms - stage.start_ms, total) }));
  }
  const track = make("div", { class: "bars-track", "aria-hidden": "true" }, bars);
  const summary = make(
    "summary",
    {},
    make("code", {}, String(request.id).slice(0, 12)),
    track,
    make("span", { class: "number" }, duration(total)),
  );
  return make("details", { class: "request" }, summary, details(request, stages));
}

function details(request, stages) {
  const verdict = request.verdict && request.verdict.text ? request.verdict.text : "";
  const facts = [
    `ended with ${request.outcome}`,
    `${count(request.num_prompt_tokens || 0)} prompt tokens, ${count(request.num_cached_tokens || 0)} of them cached`,
    `${count(request.num_output_tokens || 0)} output tokens`,
  ];
  const list = make("ol", { class: "stages" });
  for (const stage of stages) {
    const took = stage.end_ms - stage.start_ms;
    if (took < 0.005) continue;
    const kind = KIND_OF[stage.name] || "wait";
    const at = `${stage.name.replaceAll("_", " ")}: ${duration(took)} from ${duration(stage.start_ms)}`;
    const swatch = make("span", { class: `swatch stage-${kind}`, "aria-hidden": "true" });
    list.append(make("li", {}, swatch, stage.worker ? `${at}, ${stage.worker}` : at));
  }
  return make("div", {}, make("p", {}, verdict), make("p", { class: "details" }, facts.join(" · ")), list);
}
