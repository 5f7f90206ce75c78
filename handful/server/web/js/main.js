// The page: what is on it, put together.

import { getJson, hasKey, setKey } from "./api.js";
import { ask, stop, writeOn } from "./ask.js";
import { drawDetail, onClose } from "./detail.js";
import { count, fill, find, findAll, h, percent, plural, short } from "./dom.js";
import { MapView, pickExpert } from "./map.js";
import { hasOthers, legend } from "./palette.js";
import { askRanks, drawRanks } from "./ranks.js";
import { Run } from "./run.js";
import { change, drawn, isMixture, marked, parting, runs, state } from "./state.js";
import { visits } from "./storage.js";
import { TokensView } from "./tokens.js";
import { Tour } from "./tour.js";
import { load, save } from "./trace.js";

const EXAMPLES = {
  completion: ["def main(", "import os\n", "class Router:", "The capital of France is"],
  chat: ["What is a mixture of experts?", "Write a haiku about rivers.", "17 × 23 = ?"],
};

const views = ["a", "b"].map((slot) => new TokensView(find(`#text-${slot}`), slot, find("#token-readout")));
const map = new MapView();
const tour = new Tour((prompt) => {
  find("#prompt").value = prompt;
  setMode("completion");
  send();
});

// ---------------------------------------------------------------------------------------------------------------------
// Asking.

const mode = () => find("input[name=mode]:checked").value;

function setMode(value) {
  for (const input of findAll("input[name=mode]")) input.checked = input.value === value;
  modeChanged();
}

function modeChanged() {
  const chat = mode() === "chat";
  find("#prompt").placeholder = chat ? "Say something" : "Begin a text, and the model goes on: def main(";
  fill(find("#examples"), EXAMPLES[mode()].map((text) =>
    h("button", { type: "button", class: "example", on: { click: () => { find("#prompt").value = text; send(); } } }, text.trim())));
  for (const run of runs()) if (run.messages.length > 0 !== chat && run.status !== "busy") run.messages = [];
  change();
}

function send() {
  const fields = [find("#prompt"), find("#prompt-b")];
  const prompts = fields.map((field) => field.value);
  if (!prompts[0].trim() && !(state.two && prompts[1].trim())) {
    fields[0].focus();
    return;
  }
  for (const id of ["max-tokens", "temperature", "seed"]) if (!find(`#${id}`).reportValidity()) return;
  if (!tour.root.hidden) tour.close();
  if (state.model !== state.served) serve();
  const chat = mode() === "chat";
  if (chat) for (const field of fields) field.value = "";
  ask(prompts, chat).then(() => {
    const failed = chat && runs().every((run) => run.status === "failed");
    if (failed) fields.forEach((field, i) => (field.value ||= prompts[i]));
    // Two prompts are there to see what changes.
    if (state.two && state.map === "a" && runs().every((run) => run.status === "done")) change({ map: "difference" });
  });
}

/** What is on the page is the served model's again, after a trace of another one. */
function serve() {
  change({ model: state.served, a: new Run("a", state.served), b: state.two ? new Run("b", state.served) : null, layer: 0, pick: null, map: "a" });
}

function setTwo(two) {
  const b = two ? new Run("b", state.model) : null;
  stop();
  change({ two, b, map: two ? state.map : "a", pick: null });
  if (two) find("#prompt-b").focus();
}

find("#ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs().some((run) => run.status === "busy")) stop();
  else send();
});
for (const field of [find("#prompt"), find("#prompt-b")]) {
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!runs().some((run) => run.status === "busy")) send();
    }
  });
}
for (const input of findAll("input[name=mode]")) input.addEventListener("change", modeChanged);
find("#write-on").addEventListener("click", () => writeOn());
find("#two").addEventListener("click", () => setTwo(!state.two));
find("#close-b").addEventListener("click", () => setTwo(false));
find("#clear").addEventListener("click", () => {
  stop();
  serve();
  find("#prompt").focus();
});
find("#save").addEventListener("click", save);
find("#load").addEventListener("click", () => find("#file").click());
find("#file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  stop();
  tour.root.hidden = true;
  await load(file).then(() => wrong(""), (error) => wrong(error.message));
});

/** One line above the prompt: what went wrong. */
function wrong(text) {
  find("#wrong").textContent = text;
  find("#wrong").hidden = !text;
}

// ---------------------------------------------------------------------------------------------------------------------
// Drawing.

function drawTexts() {
  const busy = runs().some((run) => run.status === "busy");
  const empty = runs().every((run) => run.tokens.length === 0);
  for (const [slot, view] of ["a", "b"].map((name, i) => [name, views[i]])) {
    const run = state[slot];
    find(`#side-${slot}`).hidden = !run;
    if (run) {
      const off = Object.entries(run.off).flatMap(([layer, list]) => list.map((expert) => `layer ${layer} expert ${expert}`));
      find(`#head-${slot}`).textContent = off.length ? `${slot.toUpperCase()} · without ${off.join(", ")}` : slot.toUpperCase();
      const note = find(`#note-${slot}`);
      const told = run.status === "busy" && run.rate ? `${Math.round(run.rate)} tokens a second` : run.status === "busy" ? "Reading…" : run.note;
      note.textContent = slot === "b" && run.status !== "busy" ? `${told} ${sayParting()}` : told;
      note.classList.toggle("wrong", run.status === "failed");
    }
    view.draw();
  }
  // For who does not see it: the end of an answer, said once.
  const said = busy ? "" : runs().map((run) => run.note).filter(Boolean).join(" ");
  if (find("#said").textContent !== said) find("#said").textContent = said;
  const { scrollTop, scrollHeight, clientHeight } = find("#texts");
  if (busy && scrollHeight - scrollTop - clientHeight < 120) find("#texts").scrollTop = scrollHeight;
  find("#texts").classList.toggle("two", state.b !== null);
  find("#texts").hidden = !tour.root.hidden && empty;
  find("#empty").hidden = !empty || !tour.root.hidden;
  find("#examples").hidden = !empty;
  find("#talk").dataset.mode = mode();
  find("#prompt-b").hidden = find("#label-b").hidden = find("#label-a").hidden = !state.two;
  find("#two").setAttribute("aria-pressed", state.two);
  find("#go").textContent = busy ? "Stop" : mode() === "chat" ? "Send" : "Complete";
  find("#go").classList.toggle("stop", busy);
  const file = state.a.file !== null;
  find("#write-on").hidden = mode() === "chat" || empty || busy || file;
  find("#save").disabled = empty;
  find("#clear").hidden = empty || busy;
  find("#legend").hidden = empty || !isMixture();
  if (!find("#legend").hidden) drawLegend();
}

let legendOf = ""; // drawn anew only when it is another one, so that the focus stays

function drawLegend() {
  const number = state.model.moe_layers[state.layer];
  const hues = legend();
  const expert = marked();
  const now = JSON.stringify([number, hues, hasOthers(), expert]);
  if (now === legendOf) return;
  legendOf = now;
  const inside = findAll("#legend button").indexOf(document.activeElement);
  fill(find("#legend"),
    h("span", {}, `First expert in layer ${number}:`),
    hues.map(([one, hue]) => h("button", {
      type: "button", class: "chip", data: { hue }, ariaLabel: `Expert ${one}`, aria: { pressed: one === expert }, on: { click: () => pickExpert(one) },
    }, h("span", { class: "dot" }), String(one))),
    hasOthers() && h("span", { class: "others" }, h("span", { class: "dot" }), "others"));
  findAll("#legend button")[inside]?.focus({ preventScroll: true });
}

function sayParting() {
  const { a, b } = state;
  const from = b.asked?.ids.length;
  const at = parting();
  if (at === null) return "";
  if (at >= a.tokens.length && at >= b.tokens.length) return "It is the same answer as A.";
  return at === from ? "It parts from A at its first token." : `Its first ${plural(at - from, "token")} are those of A.`;
}

onClose((pick) =>
  pick.kind === "token" ? views.find((view) => view.run === pick.run)?.nodes[pick.index] : map.tiles?.[pick.expert]);

function drawModel() {
  const { model } = state;
  document.title = `${model.model} · Handful`;
  find("#model").textContent = model.model;
  const shape = isMixture()
    ? `${model.moe_layers.length} MoE layers of ${model.experts} experts, ${model.top_k} a token${model.shared ? ", and a shared one" : ""}`
    : `${count(model.layers)} layers, dense`;
  find("#shape").textContent = model === state.served ? shape : `${shape} · from a trace`;
  const gauge = (id, part, whole, text) => {
    find(`#${id}`).style.setProperty("--share", whole ? part / whole : 0);
    find(`#${id}-text`).textContent = text;
    find(`#${id}`).hidden = !whole;
  };
  const { parameters: p, bytes: b, memory: m } = model;
  gauge("active", p.active, p.total, `${short(p.active)} of ${short(p.total)} (${percent(p.active / p.total)})`);
  gauge("bytes", b.token, b.total, `${short(b.token, "B")} of ${short(b.total, "B")} (${percent(b.token / b.total)})`);
  gauge("memory", m?.slots ?? 0, m?.experts ?? 0, m ? `${count(Math.min(m.slots, m.experts))} of ${count(m.experts)} (${percent(Math.min(1, m.slots / m.experts))})` : "");
  for (const node of findAll(".mixture")) node.hidden = !isMixture();
  find("#dense").hidden = isMixture();
}

drawn(() => {
  if (!state.model) return;
  drawModel();
  map.draw();
  drawTexts();
  drawDetail();
  drawRanks();
});

// ---------------------------------------------------------------------------------------------------------------------
// What the server says of its experts: while something runs, and when that view is shown.

async function watch() {
  await askRanks();
  const wanted = state.map === "lately" || state.served?.memory || state.ranks || state.pick?.kind === "expert";
  if (wanted && !document.hidden && state.model === state.served && isMixture()) {
    await getJson("routing/experts").then((lately) => change({ lately }), () => {});
  }
  const busy = runs().some((run) => run.status === "busy") || state.ranks?.gone.length > 0;
  setTimeout(watch, busy ? 500 : 2000);
}

// ---------------------------------------------------------------------------------------------------------------------
// Light and dark, the key, the beginning.

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  visits.set("handful.theme", theme);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  fill(find("#theme"), h("span", {}, "Theme: "), theme);
  find("#theme").setAttribute("aria-label", `Theme: ${theme}`);
  map.repaint();
}
find("#theme").addEventListener("click", () => {
  const now = visits.get("handful.theme") ?? "auto";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});

function askKey(message) {
  find("#key-wrong").textContent = message;
  if (!find("#key").open) find("#key").showModal();
}
find("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("#key-value").value.trim());
  find("#key-value").value = "";
  find("#key").close();
  change({ key: false });
  wrong("");
  if (!state.served) begin();
});
find("#key").addEventListener("cancel", () => {
  change({ key: false });
  if (!state.served) wrong("Without its key the server tells nothing. Load the page again to give it.");
});
drawn(() => state.key && askKey(""));

async function begin() {
  let model;
  try {
    model = await getJson("routing/model");
  } catch (error) {
    if (error.status === 401) askKey(hasKey() ? "That key is wrong." : "");
    else wrong(error.message);
    return;
  }
  wrong("");
  find("#app").hidden = false;
  change({ served: model, model, a: new Run("a", model), layer: 0 });
  find("#modes").hidden = !model.chat;
  find("#how").hidden = !isMixture();
  if (model.chat) find("#max-tokens").value = 200;
  setMode(model.chat ? "chat" : "completion");
  if (isMixture()) tour.greet();
  watch();
}

setTheme(THEMES.find((theme) => theme === visits.get("handful.theme")) ?? "auto");
begin();
