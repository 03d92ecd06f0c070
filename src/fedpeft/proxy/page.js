"use strict";
// One chat, answered by every model that the server has. Texts go into the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const LABELS = { proxy: "Steered large model", large: "Large model, untuned", small: "Tuned small model" };
const ORDER = ["large", "proxy", "small"];
let models = [];
let turns = []; // {text, answers: {model id: {text, node}}}
let key = "";
let running = null; // AbortController of the answers that are coming

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function load() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    $("door").hidden = response.status !== 401;
    if (response.status === 401) {
      about(key ? "That key is wrong." : "Locked.", Boolean(key));
      $("key").focus();
      return;
    }
    if (!response.ok) throw new Error(await problem(response));
    models = (await response.json()).data.sort((a, b) => ORDER.indexOf(a.kind) - ORDER.indexOf(b.kind));
    show();
  } catch (error) {
    about(`The server cannot be asked: ${error.message}`, true);
  }
}

function about(text, wrong = false) {
  $("about").textContent = text;
  $("about").className = wrong ? "error" : "";
}

function show() {
  const steered = models.find((model) => model.kind === "proxy");
  const main = steered || models[0];
  $("name").textContent = main.id;
  $("max").max = main.max_tokens;
  if (steered) {
    about(`${steered.large}, steered by a small model; alpha ${steered.alpha} unless you move it`);
    $("alpha").min = Math.min(0, Math.floor(steered.alpha));
    $("alpha").max = Math.max(2, Math.ceil(steered.alpha));
    setAlpha(steered.alpha);
  } else {
    about(main.kind === "small" ? "the tuned small model alone; start the server with --large to steer a large one"
      : "the large model alone");
  }
  $("steer").hidden = !steered;
  $("send").disabled = $("new").disabled = false;
  $("text").focus();
}

function setAlpha(value) {
  $("alpha").step = "any"; // the chosen value may lie between two steps
  $("alpha").value = value;
  tellAlpha();
}

function alpha() {
  const own = models.find((model) => model.kind === "proxy").alpha;
  const value = Number($("alpha").value);
  return value === own ? own : Math.round(value * 100) / 100;
}

function tellAlpha() {
  $("alpha-shown").textContent = String(alpha());
}

function element(kind, name, text = "") {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
}

function card(model, grid) {
  const node = element("article", `answer ${model.kind}`);
  node.dataset.model = model.kind;
  node.append(element("h2", "", LABELS[model.kind]), element("p", ""), element("small", ""));
  grid.append(node);
  return node;
}

function messages(model, upTo) {
  const found = [];
  for (const turn of turns.slice(0, upTo)) {
    if (turn.answers[model.id].failed) continue; // what got no answer would spoil every later question
    found.push({ role: "user", content: turn.text });
    found.push({ role: "assistant", content: turn.answers[model.id].text });
  }
  return [...found, { role: "user", content: turns[upTo].text }];
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(model, place, signal) {
  const held = turns[place].answers[model.id];
  const [, text, foot] = held.node.children;
  const title = held.node.children[0];
  held.text = text.textContent = foot.textContent = "";
  held.failed = false;
  foot.className = "";
  held.node.classList.add("busy");
  const body = {
    model: model.id, messages: messages(model, place), stream: true, stream_options: { include_usage: true },
    temperature: Number($("temperature").value), seed: Number($("seed").value),
  };
  if ($("max").value) body.max_tokens = Number($("max").value); // else as many as there is room for
  if (model.kind === "proxy") {
    body.alpha = alpha();
    title.textContent = `${LABELS.proxy}, alpha ${body.alpha}`;
  }
  const began = performance.now();
  let finish = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const part of events(response)) {
      if (part.error) throw new Error(part.error.message);
      for (const choice of part.choices) {
        held.text += choice.delta.content || "";
        finish = choice.finish_reason || finish;
      }
      text.textContent = held.text;
      if (part.usage) {
        const seconds = (performance.now() - began) / 1000;
        const cut = finish === "length" ? ", cut" : "";
        foot.textContent = `${part.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s${cut}`;
      }
    }
    if (!finish) throw new Error("the connection broke before the answer was complete");
  } catch (error) {
    const stopped = error.name === "AbortError";
    held.failed = !stopped;
    foot.textContent = stopped ? "stopped" : `Error: ${error.message} (“New chat” begins anew.)`;
    foot.className = stopped ? "" : "error";
  } finally {
    held.node.classList.remove("busy");
  }
}

async function run(asked, place) {
  running = new AbortController();
  busy(true);
  try {
    await Promise.all(asked.map((model) => answer(model, place, running.signal)));
  } finally {
    running = null;
    busy(false);
  }
}

function busy(now) {
  $("send").disabled = $("alpha").disabled = $("alpha-own").disabled = $("new").disabled = now;
  $("stop").hidden = !now;
  document.body.dataset.state = now ? "busy" : "ready";
}

async function send() {
  const text = $("text").value;
  if (running || !models.length || !text.trim() || !$("ask").reportValidity()) return;
  $("text").value = "";
  $("empty").hidden = true;
  const grid = element("div", "answers");
  $("talk").append(element("p", "mine", text), grid);
  const answers = Object.fromEntries(models.map((model) => [model.id, { text: "", node: card(model, grid) }]));
  turns.push({ text, answers });
  grid.scrollIntoView({ block: "end" });
  await run(models, turns.length - 1);
  grid.scrollIntoView({ block: "nearest" });
  $("text").focus();
}

// Moving the slider asks the last question again, of the steered model alone.
async function steer() {
  tellAlpha();
  const steered = models.filter((model) => model.kind === "proxy");
  if (!running && turns.length) await run(steered, turns.length - 1);
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("stop").addEventListener("click", () => running && running.abort());
$("alpha").addEventListener("input", () => { $("alpha").step = "0.05"; tellAlpha(); });
$("alpha").addEventListener("change", steer);
$("alpha-own").addEventListener("click", () => {
  setAlpha(models.find((model) => model.kind === "proxy").alpha);
  steer();
});
$("new").addEventListener("click", () => {
  turns = [];
  $("talk").replaceChildren($("empty"));
  $("empty").hidden = false;
});
$("door").addEventListener("submit", (event) => { event.preventDefault(); key = $("key").value; load(); });
load();
