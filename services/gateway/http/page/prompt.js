// The box to try a prompt: its tokens as they come, each marked with the worker that made it.

import { count, duration, find, make } from "./dom.js";

const NUM_STYLES = 6; // of workers, as page.css has them
const styles = new Map(); // by worker
let running = null; // its AbortController

export function setUpPrompt(ask) {
  find("try").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) generate(ask);
  });
  find("stop").addEventListener("click", () => running && running.abort());
}

async function generate(ask) {
  running = new AbortController();
  const output = find("output");
  output.replaceChildren();
  styles.clear();
  find("makers").replaceChildren();
  setBusy(true);
  say("sent");
  const seen = { tokens: 0, startedAt: performance.now(), firstAt: 0, maker: "" };
  try {
    const answer = await ask("v1/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!answer.ok) throw new Error(await reason(answer));
    await read(answer.body, (chunk) => show(chunk, output, seen));
    say(summary(seen, "done"));
  } catch (error) {
    say(error.name === "AbortError" ? summary(seen, "stopped") : `failed: ${error.message}`);
  }
  running = null;
  setBusy(false);
}

function request() {
  return {
    prompt: find("prompt").value,
    max_tokens: Number(find("max-tokens").value),
    temperature: Number(find("temperature").value),
    stream: true,
    stream_options: { include_worker: true },
  };
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `status ${answer.status}`;
  }
}

// Server-sent events, which fetch does not take apart.
async function read(body, take) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      take(chunk);
    }
  }
}

function show(chunk, output, seen) {
  const choice = chunk.choices[0];
  if (!choice) return;
  seen.tokens += 1;
  seen.firstAt ||= performance.now();
  const worker = (chunk.kvbaton && chunk.kvbaton.worker) || "unknown";
  const style = styleOf(worker);
  if (worker !== seen.maker) {
    seen.maker = worker;
    output.append(make("span", { class: `maker ${style}` }, worker));
  }
  output.append(make("span", { class: `token ${style}`, title: `made by ${worker}` }, choice.text));
}

function styleOf(worker) {
  if (!styles.has(worker)) {
    styles.set(worker, `maker-${styles.size % NUM_STYLES}`);
    const sample = make("span", { class: `token ${styles.get(worker)}` }, worker);
    find("makers").append(make("li", {}, sample));
  }
  return styles.get(worker);
}

function summary(seen, how) {
  if (!seen.tokens) return how;
  const first = duration(seen.firstAt - seen.startedAt);
  const each = seen.tokens > 1 ? (performance.now() - seen.firstAt) / (seen.tokens - 1) : 0;
  const pace = each ? `, then one each ${duration(each)}` : "";
  return `${how}: ${count(seen.tokens)} tokens, the first after ${first}${pace}`;
}

function setBusy(isBusy) {
  find("send").disabled = isBusy;
  find("stop").disabled = !isBusy;
}

function say(text) {
  find("try-status").textContent = text;
}
