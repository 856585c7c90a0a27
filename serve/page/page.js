"use strict";
const $ = (id) => document.getElementById(id);
const make = (tag, text, fields = {}) => Object.assign(document.createElement(tag), { textContent: text ?? "" }, fields);
let models = [];
let stopping = null;

// ---- the server ---------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const answer = await fetch(path, { ...options, headers: headers(), signal });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${answer.status}`);
}

async function* events(path, body, signal) {
  const reader = (await ask(path, { ...body, stream: true }, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part; !(part = await reader.read()).done; ) {
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices[0];
    }
  }
}

/** Runs what a button does: one at a time, with its errors shown. */
async function working(what, does) {
  $("problem").hidden = true;
  $("status").textContent = what;
  stopping?.abort();
  const mine = (stopping = new AbortController());
  document.querySelectorAll("#f-stop, #d-stop").forEach((b) => (b.disabled = false));
  try {
    await does(mine.signal);
    if (stopping === mine) $("status").textContent = "Done.";
  } catch (error) {
    if (error.name !== "AbortError") {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
    if (stopping === mine) $("status").textContent = error.name === "AbortError" ? "Stopped." : "";
  } finally {
    if (stopping === mine) document.querySelectorAll("#f-stop, #d-stop").forEach((b) => (b.disabled = true));
  }
}

const percent = (p) => (p >= 0.1 ? (100 * p).toFixed(0) : (100 * p).toFixed(p >= 0.01 ? 1 : 2)) + " %";
const shade = (p) => "p" + [0.01, 0.05, 0.2, 0.5].filter((edge) => p >= edge).length;
const visible = (token) => token.replace(/\n/g, "\u21b5").replace(/^ +$/, "\u2423").trim() || "\u2205";
const runOf = (section) => document.querySelector(`#${section} select.run`).value;

function bars(candidates, choose) {
  const list = make("ul", "", { className: "bars" });
  for (const { token, p } of candidates) {
    const item = make("li");
    item.append(
      choose ? make("button", visible(token), { onclick: () => choose(token) }) : make("code", visible(token)),
      make("span", percent(p)),
      Object.assign(make("meter"), { value: p, min: 0, max: 1, ariaLabel: `probability of ${token}` }),
    );
    list.append(item);
  }
  return list;
}

// ---- forward ------------------------------------------------------------------------------------------------------

async function readForward(signal) {
  const text = $("f-text").value;
  const found = await (await ask("tokens", { model: runOf("forward"), text, direction: "forward", top: 8 }, signal)).json();
  $("f-others").hidden = true;
  $("f-tokens").replaceChildren(
    ...found.tokens.map((token, i) => {
      const label = `${token.text.trim() || "space"}, ${percent(token.p)}`;
      const button = make("button", token.text, { className: shade(token.p), title: label, ariaLabel: label });
      button.onclick = () => {
        const before = found.tokens.slice(0, i).map((t) => t.text).join("");
        $("f-others").replaceChildren(
          make("h3", `After \u201c${before.slice(-40)}\u201d it expected`),
          bars(token.top, (other) => {
            $("f-text").value = (before + other).replace(/^ /, "");
            working("Continuing\u2026", continueForward);
          }),
          make("p", `\u201c${token.text}\u201d had ${percent(token.p)}. Choose another token to continue from it.`),
        );
        $("f-others").hidden = false;
      };
      return button;
    }),
  );
}

async function continueForward(signal) {
  const [box, count] = [$("f-text"), Number($("f-count").value)];
  const body = { model: runOf("forward"), prompt: box.value, max_tokens: count, temperature: Number($("f-temperature").value) };
  for await (const choice of events("v1/completions", body, signal)) box.value += choice.text;
  await readForward(signal);
}

// ---- both ways ----------------------------------------------------------------------------------------------------

let words = [];

function splitWords() {
  words = $("b-text").value.split(/(\s+|[.,;:!?]+)/).filter(Boolean).map((text) => ({ text, hidden: false }));
  showWords();
}

function showWords() {
  $("b-words").replaceChildren(
    ...words.map((word) => {
      if (!/[\p{L}\p{N}]/u.test(word.text)) return make("span", word.text);
      const shown = word.filled == null ? null : visible(word.filled);
      const button = make("button", shown ?? (word.hidden ? "\u2588\u2588\u2588" : word.text), { className: "word" });
      button.setAttribute("aria-pressed", word.hidden);
      button.setAttribute("aria-label", word.hidden ? `${word.text}, hidden` : word.text);
      button.onclick = () => {
        Object.assign(word, { hidden: !word.hidden, filled: null });
        const at = [...$("b-words").children].indexOf(button);
        showWords();
        $("b-words").children[at].focus();
      };
      return button;
    }),
  );
}

const mask = () => models.find((m) => m.id === runOf("both"))?.mask ?? "[MASK]";
const masked = () => words.map((w) => (w.hidden && w.filled == null ? mask() : (w.filled ?? w.text))).join("");

async function askFill(signal) {
  const answer = await ask("fill", { model: runOf("both"), input: masked(), top: 6 }, signal);
  return (await answer.json()).data[0].masks;
}

function hiddenWords() {
  words.forEach((word) => (word.filled = null));
  const found = words.filter((word) => word.hidden);
  if (!found.length) throw new Error("choose a word to hide first");
  return found;
}

async function fillOnce(signal) {
  const [hidden, out] = [hiddenWords(), $("b-found")];
  out.replaceChildren();
  const found = await askFill(signal);
  hidden.forEach((word, i) => {
    const card = make("div", "", { className: "card" });
    card.append(make("h3", `Where \u201c${word.text}\u201d stood`), bars(found[i]));
    out.append(card);
    word.filled = found[i][0].token.replace(/^ /, "");
  });
  showWords();
}

async function fillInSteps(signal) {
  const [hidden, out] = [hiddenWords(), $("b-found")];
  out.replaceChildren();
  for (let step = 1; hidden.some((w) => w.filled == null); step++) {
    const [left, found] = [hidden.filter((w) => w.filled == null), await askFill(signal)];
    const best = found.reduce((most, some, i) => (some[0].p > found[most][0].p ? i : most), 0);
    left[best].filled = found[best][0].token.replace(/^ /, "");
    const card = make("div", "", { className: "card" });
    card.append(
      make("h3", `Step ${step}: \u201c${visible(left[best].filled)}\u201d where \u201c${left[best].text}\u201d stood, ${percent(found[best][0].p)}`),
      bars(found[best].slice(0, 3)),
    );
    out.append(card);
    showWords();
  }
}

// ---- the dial -----------------------------------------------------------------------------------------------------

function blockSizes() {
  const run = models.find((m) => m.id === runOf("dial"));
  if (!run) return [16];
  if (run.kind === "masked") return [1, 2, 4, 8, 16];
  if (run.kind !== "diffusion") return [1];
  const known = run.block_sizes.filter((size) => size > 0);
  return (run.block_sizes.includes(0) ? [...new Set([...known, 2, 8, 16])] : known).sort((a, b) => a - b);
}

function showDial() {
  const sizes = blockSizes();
  $("d-block").max = sizes.length - 1;
  const size = sizes[Math.min(Number($("d-block").value), sizes.length - 1)];
  $("d-block").setAttribute("aria-valuetext", `${size} tokens`);
  $("d-size").textContent = size;
  return size;
}

async function writeBlocks(signal) {
  const [size, run, out] = [showDial(), models.find((m) => m.id === runOf("dial")), $("d-out")];
  const body = { model: run.id, prompt: $("d-text").value, max_tokens: Math.min(64, run.context_length / 2), seed: 1 };
  if (["masked", "diffusion"].includes(run.kind)) Object.assign(body, { block: size, steps: Math.min(size, Number($("d-steps").value)) });
  out.replaceChildren(make("span", body.prompt));
  const began = performance.now();
  let parts = 0;
  for await (const choice of events("v1/completions", body, signal)) {
    out.querySelector(".new")?.classList.remove("new");
    if (choice.text) out.append(make("span", choice.text, { className: "new" }));
    parts += Boolean(choice.text);
    $("d-figures").textContent = `${parts} parts in ${((performance.now() - began) / 1000).toFixed(1)} s, blocks of ${size}`;
  }
}

// ---- score, search, chat ------------------------------------------------------------------------------------------

async function scoreBoth(signal) {
  const [input, body] = [[$("s-one").value, $("s-two").value], $("s-table").tBodies[0]];
  body.replaceChildren();
  $("s-table").hidden = false;
  for (const run of models.filter((m) => m.abilities.includes("score") && m.kind !== "seq2seq")) {
    const rules = run.kind === "hybrid" ? ["causal", "pll"] : [null];
    for (const rule of rules) {
      const [one, two] = (await (await ask("score", { model: run.id, input, rule }, signal)).json()).data;
      const row = make("tr");
      row.append(Object.assign(make("th", run.id), { scope: "row" }));
      const prefers = one.logprob === two.logprob ? "neither" : one.logprob > two.logprob ? "first" : "second";
      for (const cell of [one.rule, one.logprob?.toFixed(1), two.logprob?.toFixed(1), prefers]) row.append(make("td", cell));
      body.append(row);
    }
  }
}

async function search(signal) {
  const documents = $("q-texts").value.split("\n").filter((line) => line.trim());
  const body = { model: runOf("search"), query: $("q-query").value, documents };
  const found = await (await ask("rerank", body, signal)).json();
  $("q-found").replaceChildren(
    ...found.results.map((one) => make("li", `${one.relevance_score.toFixed(3)}  ${documents[one.index]}`)),
  );
}

let messages = [];

async function send(signal) {
  const content = $("c-text").value;
  if (!content.trim()) throw new Error("write a message first");
  messages.push({ role: "user", content });
  $("c-text").value = "";
  const [mine, theirs] = [make("p", content, { className: "card said" }), make("p", "", { className: "said" })];
  $("c-log").append(mine, theirs);
  try {
    for await (const choice of events("v1/chat/completions", { model: runOf("chat"), messages }, signal))
      theirs.textContent += choice.delta?.content ?? "";
    messages.push({ role: "assistant", content: theirs.textContent });
  } catch (error) {
    messages.pop();
    throw error;
  }
}

// ---- the page -----------------------------------------------------------------------------------------------------

const WHY_NONE = {
  forward: "No run here reads forward.", both: "No run here reads both ways and predicts tokens.", dial: "No run here writes.",
  score: "No run here scores.", search: "No run here makes vectors.", chat: "No run here has a chat template: import one that has.",
};

function choices(select) {
  const [what, direction] = [select.dataset.for, select.dataset.direction];
  if (what === "dial") return models.filter((m) => m.abilities.includes("complete") && m.kind !== "seq2seq")
    .sort((a, b) => ["diffusion", "masked"].includes(b.kind) - ["diffusion", "masked"].includes(a.kind));
  return models.filter((m) => m.abilities.includes(what) && !(direction === "forward" && ["masked", "diffusion"].includes(m.kind)));
}

async function loadModels() {
  models = (await (await ask("v1/models")).json()).data;
  for (const select of document.querySelectorAll("select.run")) {
    const found = choices(select);
    select.replaceChildren(...found.map((m) => make("option", `${m.id} (${m.kind})`, { value: m.id })));
    const section = select.closest("section");
    section.querySelectorAll("button").forEach((b) => (b.disabled = !found.length || b.id.endsWith("stop")));
    section.querySelector(".none")?.remove();
    if (!found.length) section.querySelector(".why").after(make("p", WHY_NONE[section.id], { className: "none card" }));
  }
  $("status").textContent = `${models.length} run${models.length === 1 ? "" : "s"} here: ${models.map((m) => m.id).join(", ")}.`;
  showDial();
}

function openTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  history.replaceState(null, "", "#" + tab.getAttribute("aria-controls"));
}

$("tabs").addEventListener("click", (e) => e.target.role === "tab" && openTab(e.target));
$("tabs").addEventListener("keydown", (e) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (!step) return;
  const all = [...document.querySelectorAll("[role=tab]")];
  const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
  openTab(next);
  next.focus();
});
const BUTTONS = {
  "f-read": ["Reading\u2026", readForward], "f-go": ["Continuing\u2026", continueForward], "b-once": ["Filling\u2026", fillOnce],
  "b-steps": ["Filling in steps\u2026", fillInSteps], "d-go": ["Writing\u2026", writeBlocks], "s-go": ["Scoring\u2026", scoreBoth],
  "q-go": ["Searching\u2026", search], "c-go": ["Answering\u2026", send],
};
for (const [id, [what, does]] of Object.entries(BUTTONS)) $(id).onclick = () => working(what, does);
for (const id of ["f-stop", "d-stop"]) $(id).onclick = () => stopping?.abort();
$("b-show").onclick = splitWords;
$("b-text").oninput = splitWords;
$("d-block").oninput = showDial;
// What was written once is written again as soon as the dial is turned: same prompt, same seed, another block.
$("d-block").onchange = () => $("d-out").childElementCount && $("d-go").click();
document.querySelector("#dial select.run").onchange = showDial;
$("c-new").onclick = () => { messages = []; $("c-log").replaceChildren(); };
$("c-text").onkeydown = (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); $("c-go").click(); } };
$("key").onchange = () => working("Asking what is here\u2026", loadModels);
splitWords();
const wanted = document.querySelector(`[aria-controls="${location.hash.slice(1)}"]`);
if (wanted) openTab(wanted);
working("Asking what is here\u2026", async () => { await loadModels(); }).then(() => {
  if (models.length && $("problem").hidden) $("status").textContent = `Runs here: ${models.map((m) => m.id).join(", ")}.`;
});
