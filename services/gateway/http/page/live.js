// Draws what /debug/live tells: requests, pools, latencies against their targets, KV blocks.

import { count, duration, find, make, makeSvg, percent, sized } from "./dom.js";

const HISTORY = 60; // seconds that the lines show
const history = { running: [], waiting: [], rate: [] };
let before = null; // the count of tokens, and when it was told

const BLOCK_STATES = {
  committed: "final, in use",
  granted: "being written",
  quarantined: "held until a lost worker is surely dead",
  cached: "kept to be found again",
  free: "free",
};

export function drawLive(state) {
  find("identity").textContent = `${state.model} at ${state.gateway}`;
  drawRequests(state.requests);
  for (const role of ["prefill", "decode"]) {
    drawWorkers(find(role), state.workers.filter((worker) => worker.role === role));
  }
  drawPercentiles(find("ttft"), state.ttft);
  drawPercentiles(find("tpot"), state.tpot);
  drawBlocks(state.stores);
}

// What was seen no longer holds: the lines begin anew.
export function forgetHistory() {
  before = null;
  for (const values of Object.values(history)) values.length = 0;
}

function drawRequests(requests) {
  const now = performance.now();
  const rate = before ? ((requests.tokens - before.tokens) * 1000) / (now - before.at) : 0;
  before = { tokens: requests.tokens, at: now };
  const figures = [
    ["Running", requests.running, "running"],
    ["Waiting", requests.waiting, "waiting"],
    ["Tokens a second", Math.max(0, rate), "rate"],
  ];
  const rows = figures.map(([name, value, key]) => {
    history[key].push(value);
    if (history[key].length > HISTORY) history[key].shift();
    return figure(name, count(value), line(history[key]));
  });
  find("requests").replaceChildren(...rows, figure("Ended", count(requests.ended)));
}

function figure(name, value, extra = "") {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value), extra);
}

// The last minute; the number beside it says the same to those who do not see it.
function line(values) {
  const most = Math.max(1, ...values);
  const x = (index) => (120 * (HISTORY - values.length + index)) / (HISTORY - 1);
  const y = (value) => 31 - (30 * value) / most;
  const points = values.map((value, index) => `${x(index).toFixed(1)},${y(value).toFixed(1)}`);
  return makeSvg(
    "svg",
    { viewBox: "0 0 120 32", preserveAspectRatio: "none", "aria-hidden": "true", class: "line" },
    makeSvg("polyline", { points: points.join(" ") }),
  );
}

function drawWorkers(list, workers) {
  if (!workers.length) {
    list.replaceChildren(make("li", { class: "empty" }, "There is no such worker."));
    return;
  }
  list.replaceChildren(...workers.map(workerRow));
}

function workerRow(worker) {
  const queued = worker.tokens_queued ? `prompt tokens queued: ${count(worker.tokens_queued)}` : "";
  const waiting = worker.waiting ? `${worker.waiting} waiting` : "";
  const speed = worker.tokens_per_s ? `${count(worker.tokens_per_s)} tokens/s at work` : "idle so far";
  const details = [waiting, queued, speed].filter(Boolean).join(" · ");
  const head = make("p", { class: "head" }, make("strong", {}, worker.name), ` ${worker.state}`);
  head.append(make("span", { class: "right" }, `${worker.running} of ${worker.places}`));
  const meter = make(
    "div",
    {
      role: "meter",
      class: "meter",
      "aria-label": `${worker.name}: sequences held`,
      "aria-valuemin": 0,
      "aria-valuemax": worker.places,
      "aria-valuenow": Math.min(worker.running, worker.places),
    },
    sized(make("div", { class: worker.role }), { width: percent(worker.running, worker.places) }),
  );
  const item = make("li", { "data-state": worker.state });
  item.append(head, meter, make("p", { class: "details" }, details));
  return item;
}

function drawPercentiles(box, values) {
  if (!values) {
    box.replaceChildren(make("p", { class: "empty" }, "No request has ended yet."));
    return;
  }
  const most = Math.max(values.p99, values.target || 0);
  const rows = ["p50", "p90", "p99"].map((name) => percentileRow(name, values, most));
  box.replaceChildren(...rows, make("p", { class: "details" }, aim(values)));
}

function percentileRow(name, values, most) {
  const value = values[name];
  const isOver = values.target !== null && value > values.target;
  const track = make("div", { class: "track", "aria-hidden": "true" });
  const bar = make("div", { class: isOver ? "bar over" : "bar" });
  track.append(sized(bar, { width: percent(value, most) }));
  if (values.target !== null) {
    track.append(sized(make("div", { class: "target" }), { left: percent(values.target, most) }));
  }
  const sign = values.target === null ? "" : isOver ? " ✗ over target" : " ✓ within target";
  const number = make("span", { class: "number" }, duration(value));
  return make("p", { class: "percentile" }, make("span", {}, name), track, number, make("span", { class: "sign" }, sign));
}

function aim(values) {
  if (values.target === null) return "No target is set.";
  return `Target ${duration(values.target)}, met by ${Math.round(values.met * 100)} % of those that had one.`;
}

function drawBlocks(stores) {
  find("blocks").replaceChildren(...stores.map(storeRow));
}

function storeRow(store) {
  const total = Object.values(store.blocks).reduce((sum, value) => sum + value, 0);
  const states = Object.keys(BLOCK_STATES).filter((state) => state in store.blocks);
  const handoffs = Object.values(store.handoffs).reduce((sum, value) => sum + value, 0);
  const words = total
    ? `${count(total)} blocks · ${handoffs} handoffs · ${store.waiting} wait for room`
    : "no blocks yet: no worker has joined";
  const head = make("p", { class: "head" }, make("strong", {}, `Store ${store.name}`));
  head.append(store.is_up ? " up" : " cannot be reached", make("span", { class: "right" }, words));
  const stack = make("div", { class: "stack", "aria-hidden": "true" });
  const legend = make("ul", { class: "legend", "aria-label": `Blocks of store ${store.name} by state` });
  for (const state of states) {
    const part = make("div", { class: `block-${state}` });
    stack.append(sized(part, { width: percent(store.blocks[state], total) }));
    const swatch = make("span", { class: `swatch block-${state}`, "aria-hidden": "true" });
    const name = make("span", { title: BLOCK_STATES[state] }, state);
    const number = make("strong", {}, count(store.blocks[state]));
    legend.append(make("li", {}, swatch, name, " ", number));
  }
  return make("div", { class: "store" }, head, stack, legend);
}
