// A token's page: its way through all layers, and what came after it.

import { postJson } from "./api.js";
import { fill, h, percent, plural, shown } from "./dom.js";
import { hueOf, legend } from "./palette.js";
import { change, isMixture, marked, state } from "./state.js";

/** What the router scored, asked once for each token that is chosen. */
const asked = { run: null, index: null, length: null, path: null, error: null, abort: null };

function ask(run, index) {
  asked.abort?.abort();
  Object.assign(asked, { run, index, id: run.tokens[index].id, path: null, error: null, abort: new AbortController() });
  if (!isMixture()) return;
  if (run.file) {
    asked.error = "The router's scores are not in a trace; its choices are.";
    return;
  }
  const { signal } = asked.abort;
  const body = { tokens: run.ids.slice(0, index + 1), ...(run.isOff && { experts_off: run.off }) };
  postJson("routing/path", body, signal)
    .then((path) => (asked.path = path))
    .catch((error) => error.name === "AbortError" || (asked.error = error.message))
    .finally(() => signal.aborted || change());
}

/** What a token's page depends on; first, what it is of. The model is asked for its path. */
export function tokenKey() {
  const { pick, layer } = state;
  const { run, index } = pick;
  if (asked.run !== run || asked.index !== index || asked.id !== run.tokens[index].id) ask(run, index);
  const { length } = run.tokens;
  return [`${run.name} ${index} ${asked.id}`, asked.path !== null, asked.error, layer, marked(), length, run.routing.rows, state.b !== null, legend()];
}

/** The page of the chosen token, into `root`. */
export function drawToken(root, heading) {
  const { pick, layer } = state;
  const { run, index } = pick;
  const token = run.tokens[index];
  const { path, error } = asked;
  heading.textContent = shown(token.text);
  const name = state.b ? ` of text ${run.name.toUpperCase()}` : "";
  const facts = `Token ${index + 1} of ${run.tokens.length}${name}, number ${token.id} in the vocabulary`;
  const layers = isMixture() ? state.model.moe_layers.map((number, l) => row(run, index, l, number, path)) : [];
  fill(
    root,
    h("p", { class: "facts" }, facts),
    isMixture()
      ? [sharing(run, index, layer), h("h3", {}, "Its way through the layers"), how(path), h("div", { class: "layers" }, layers)]
      : h("p", {}, "This model is dense: the token went through every parameter."),
    error && h("p", { class: "soft" }, error),
    path && [h("h3", {}, "What it made likely to come next"), next(path, run.tokens[index + 1])],
    isMixture() && !path && !error && h("p", { class: "soft" }, "Asking the model…"),
  );
}

function how(path) {
  if (!path) return null;
  return h("p", { class: "soft" }, `Bars: the router's scores (${state.model.score}) of all ${state.model.experts} experts. In colour: the chosen ones, with their weights.`);
}

/** Who else chose the same expert. */
function sharing(run, index, layer) {
  const expert = marked();
  if (expert === null && index < run.routing.rows) return h("p", {}, "No expert of this layer computed it.");
  if (expert === null) return h("p", {}, "It is the last token: the model has not read it yet, so that no expert was chosen for it here. Below is what it would choose.");
  let others = 0;
  for (let i = 0; i < run.routing.rows; i++) if (i !== index && run.routing.took(i, layer, expert)) others++;
  const where = `layer ${state.model.moe_layers[layer]}`;
  return h("p", {}, others
    ? `Expert ${expert} of ${where} also took ${plural(others, "other token")} of this text, which ${others === 1 ? "is" : "are"} marked.`
    : `Expert ${expert} of ${where} took no other token of this text.`);
}

function row(run, index, layer, number, path) {
  const here = layer === state.layer;
  const told = path?.layers.find((one) => one.layer === number);
  const chosen = told
    ? told.experts.map((expert, k) => ({ expert, weight: told.weights[k] })).sort((a, b) => b.weight - a.weight)
    : run.routing.at(index, layer);
  const many = chosen.length > 3;
  const chips = chosen.map(({ expert, weight }) =>
    h("button", {
      class: "chip", type: "button", data: here ? { hue: hueOf(expert) } : {}, aria: { pressed: here && marked() === expert },
      title: `Mark the tokens that chose expert ${expert} in layer ${number}`,
      ...(many && { ariaLabel: `expert ${expert}, weight ${weight?.toFixed(2) ?? "unknown"}` }),
      on: { click: () => change({ layer, pick: { ...state.pick, expert } }) },
    }, h("span", { class: "dot" }), many ? `${expert}` : `expert ${expert}`, weight === null ? null : h("b", {}, weight.toFixed(2))));
  return h("div", { class: `way${here ? " here" : ""}`, role: "group", aria: { label: `Layer ${number}` } },
    h("span", { class: "way-layer" }, `Layer ${number}`), told ? bars(told) : null, h("span", { class: "chips" }, chips));
}

const SVG = "http://www.w3.org/2000/svg";

/** The scores of all experts as thin bars. */
export function bars({ scores, experts }) {
  const most = Math.max(...scores);
  const svg = document.createElementNS(SVG, "svg");
  const step = scores.length > 128 ? 1 : 4;
  svg.setAttribute("viewBox", `0 0 ${scores.length * step} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "bars");
  svg.setAttribute("aria-hidden", "true");
  const line = (kind, list) => {
    const path = document.createElementNS(SVG, "path");
    const gap = step === 1 ? 0 : 1;
    path.setAttribute("d", list.map((e) => {
      const tall = Math.max(2, most > 0 ? (98 * scores[e]) / most : 0);
      return `M${e * step} 100v${-tall}h${step - gap}v${tall}z`;
    }).join(""));
    path.setAttribute("class", kind);
    svg.append(path);
  };
  line("rest", scores.map((_, e) => e).filter((e) => !experts.includes(e)));
  line("chosen", experts);
  return svg;
}

/** The ten most probable next tokens; the one that came is marked. */
export function next(path, came, limit = 10) {
  const most = Math.max(...path.next.map((one) => one.probability));
  const rows = path.next.slice(0, limit).map((one) => {
    const here = came?.id === one.token;
    const bar = h("span", { class: "bar", css: { "--share": most > 0 ? one.probability / most : 0 } });
    return h("tr", { class: here ? "came" : "" }, h("th", { scope: "row" }, shown(one.text ?? `token ${one.token}`)), h("td", { class: "wide" }, bar),
      h("td", {}, percent(one.probability)), h("td", {}, here ? "← it came" : ""));
  });
  return h("table", { class: "next" }, h("tbody", {}, rows));
}
