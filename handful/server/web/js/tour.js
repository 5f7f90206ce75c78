// Five short steps on the reader's own model: token → router → experts → blend → next token.

import { postJson } from "./api.js";
import { fill, find, h, percent, plural, short, shown } from "./dom.js";
import { bars, next } from "./path.js";
import { change, state } from "./state.js";
import { visits } from "./storage.js";

const SEEN = "handful.tour"; // who has seen it is not shown it again
const STEPS = ["Token", "Router", "Experts", "Blend", "Next token"];

export class Tour {
  /** begin(prompt) is called at the end of who wants to see it write. */
  constructor(begin) {
    this.root = find("#tour");
    this.body = find("#tour-body");
    this.step = 0;
    this.data = null;
    this.begin = begin;
    find("#tour-next").addEventListener("click", () => this._next());
    find("#tour-back").addEventListener("click", () => this._to(this.step - 1));
    find("#tour-skip").addEventListener("click", () => this.close());
    find("#how").addEventListener("click", () => this.open());
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight" && this.step < STEPS.length - 1) this._to(this.step + 1);
      else if (event.key === "ArrowLeft") this._to(this.step - 1);
      else if (event.key === "Escape") this.close();
    });
  }

  /** Of who is here for the first time. */
  greet() {
    if (visits.get(SEEN) === null) this.open(false);
  }

  open(focus = true) {
    this.root.hidden = false;
    this.step = 0;
    this.data ??= this._ask();
    this._draw();
    change();
    if (focus) find("#tour-title").focus();
  }

  close() {
    visits.set(SEEN, "1");
    this.root.hidden = true;
    change();
    find("#prompt").focus();
  }

  async _ask() {
    const prompt = state.served.chat ? "A router picks a few experts" : "def main(";
    try {
      const { tokens, token_strs: texts } = await postJson("tokenize", { prompt, return_token_strs: true });
      const path = await postJson("routing/path", { tokens });
      this.found = { prompt, tokens, texts, path };
    } catch (error) {
      this.found = { error: error.message };
      this.data = null; // to be asked again when it is opened again
    }
    this._draw();
  }

  _next() {
    if (this.step < STEPS.length - 1) {
      this._to(this.step + 1);
      return;
    }
    const prompt = this.found?.prompt;
    this.close();
    if (prompt) this.begin(prompt);
  }

  _to(step) {
    if (step < 0) return;
    this.step = step;
    this._draw();
    find("#tour-title").focus();
  }

  _draw() {
    const { step, found } = this;
    find("#tour-title").textContent = STEPS[step];
    find("#tour-count").textContent = `${step + 1} of ${STEPS.length}`;
    find("#tour-back").disabled = step === 0;
    find("#tour-next").textContent = step === STEPS.length - 1 ? "See it write" : "Next";
    fill(find("#tour-trail"), STEPS.map((name, i) => h("li", { class: i === step ? "here" : i < step ? "past" : "", ...(i === step && { aria: { current: "step" } }) }, name)));
    if (!found) fill(this.body, h("p", { class: "soft" }, "Asking the model…"));
    else if (found.error) fill(this.body, h("p", { class: "wrong" }, found.error));
    else fill(this.body, [token, router, experts, blend, after][step](found));
  }
}

/** In the middle of the model, where routers have most to tell apart. */
const middle = ({ path }) => path.layers[Math.floor(path.layers.length / 2)];
const last = ({ texts }) => shown(texts.at(-1));
const term = (text) => h("b", {}, text);

function token({ tokens, texts }) {
  return [
    h("p", {}, "A model reads a text as ", term("tokens"), `: pieces of it, each with a number. These are the tokens of a prompt. We follow the last one, ${shown(texts.at(-1))}, through your model.`),
    h("ol", { class: "pieces" }, tokens.map((id, i) =>
      h("li", { class: i === tokens.length - 1 ? "here" : "" }, h("span", { class: "piece" }, shown(texts[i])), h("small", {}, String(id))))),
  ];
}

function router(found) {
  const told = middle(found);
  const best = told.experts[0];
  return [
    h("p", {}, "In each MoE layer a ", term("router"), `, a small learned map, scores all ${state.served.experts} experts for the token ${last(found)}. Here is what layer ${told.layer} scored.`),
    h("div", { class: "big-bars" }, bars(told)),
    h("p", { class: "soft" }, `Each bar is an expert; expert ${best} has a score of ${told.scores[best].toFixed(3)}.`),
  ];
}

function experts(found) {
  const told = middle(found);
  const { experts: E, top_k: K, parameters, shared } = state.served;
  const dots = Array.from({ length: E }, (_, e) => h("i", { class: told.experts.includes(e) ? "on" : "" }));
  const named = told.experts.map((e) => `expert ${e}`).join(" and ");
  return [
    h("p", {}, `It chooses ${K} of ${E}: ${K <= 3 ? named : "those in colour"}. An `, term("expert"), " is a feed-forward network: a region of parameters, not a topic.",
      shared ? " A shared expert computes for every token beside them." : ""),
    h("div", { class: "dots", role: "img", aria: { label: `${K} of ${E} experts are chosen: ${named}` } }, dots),
    h("p", { class: "soft" }, `The other ${E - K} do nothing for this token, so that it uses ${short(parameters.active)} of the model's ${short(parameters.total)} parameters.`),
  ];
}

function blend(found) {
  const told = middle(found);
  const parts = told.experts.map((expert, k) => ({ expert, weight: told.weights[k] })).sort((a, b) => b.weight - a.weight);
  const most = Math.max(...parts.map((part) => part.weight));
  const layers = found.path.layers.length;
  return [
    h("p", {}, "The chosen experts compute, and their outputs are added up, each times its ", term("weight"), "."),
    h("table", { class: "next" }, h("tbody", {}, parts.map(({ expert, weight }) =>
      h("tr", {}, h("th", { scope: "row" }, `expert ${expert}`), h("td", { class: "wide" }, h("span", { class: "bar", css: { "--share": weight / most } })), h("td", {}, `× ${weight.toFixed(2)}`))))),
    h("p", { class: "soft" }, layers > 1 ? `The next layer goes on with the sum, and its own router chooses anew: ${plural(layers, "time")} in this model.` : "This model has one such layer."),
  ];
}

function after(found) {
  return [
    h("p", {}, "After the last layer, every token of the vocabulary has a probability. One is drawn: the ", term("next token"), ". Then all of this happens again for it."),
    next(found.path, null, 5),
    h("p", { class: "soft" }, `After ${shown(found.texts.join(""))} this model finds ${shown(found.path.next[0].text)} most probable, with ${percent(found.path.next[0].probability)}.`),
  ];
}
