// Asks once a second while the page is seen, with the API key if one was typed; draws what comes.

import { find } from "./dom.js";
import { drawLive, forgetHistory } from "./live.js";
import { setUpPrompt } from "./prompt.js";
import { drawKinds, drawWaterfall } from "./waterfall.js";

const INTERVAL_MS = 1000;
const NUM_REQUESTS = 12;
let key = ""; // nowhere but here
let isOperator = true; // as far as we know
let timer = 0;
let numEnded = -1; // requests that had ended when they were drawn last

function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  return fetch(path, { cache: "no-store", ...options, headers });
}

function say(state, words) {
  const status = find("status");
  if (status.textContent === words) return; // not said again and again
  status.dataset.state = state;
  status.textContent = words;
}

async function update() {
  try {
    if (isOperator) {
      const answer = await ask("debug/live");
      if (answer.status === 401) {
        lock(key ? "this key is not known" : "needs a key");
        return; // until another is typed
      }
      if (answer.ok) await draw(await answer.json());
      else if (answer.status !== 403) throw new Error(`status ${answer.status}`);
      isOperator = answer.ok;
    }
    if (!isOperator) {
      await updateRequests();
      lock("only an operator's key shows the cluster");
    }
  } catch {
    forgetHistory();
    say("lost", "the gateway does not answer");
  }
  schedule();
}

async function draw(state) {
  drawLive(state);
  if (state.requests.ended !== numEnded) await updateRequests();
  numEnded = state.requests.ended;
  find("key-form").hidden = true;
  say("live", "live");
}

function lock(words) {
  find("key-form").hidden = false;
  say("locked", words);
}

async function updateRequests() {
  const answer = await ask(`debug/requests?limit=${NUM_REQUESTS}`);
  drawWaterfall(answer.ok ? (await answer.json()).requests || [] : []);
}

// Nothing is asked while nobody looks.
function schedule() {
  clearTimeout(timer);
  if (document.visibilityState === "visible") timer = setTimeout(update, INTERVAL_MS);
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  isOperator = true;
  clearTimeout(timer);
  update();
});
document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.visibilityState === "visible") {
    forgetHistory();
    update();
  }
});
drawKinds();
setUpPrompt(ask);
update();
