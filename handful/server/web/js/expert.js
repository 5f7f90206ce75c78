// An expert's page: what it took, beside chance, and the switch that turns it off.

import { answerWithout } from "./ask.js";
import { count, fill, h, percent, plural, shown } from "./dom.js";
import { sayLoad } from "./heat.js";
import { placeOf } from "./map.js";
import { runs, shownRun, state } from "./state.js";
import { aboveChance } from "./stats.js";

const MOST = 12; // rows of the table
const EVIDENCE = 0.05;

/** What an expert's page depends on; first, what it is of. */
export function expertKey() {
  const { model, layer, pick, map, lately } = state;
  const texts = runs().map((run) => [run.routing.rows, run.status, run.off, run.asked !== null, run.file]);
  const recent = lately?.layers?.[String(model.moe_layers[layer])]?.load[pick.expert];
  return [`${layer} ${pick.expert}`, map, texts, recent, placeOf(layer, pick.expert)];
}

export function drawExpert(root, heading) {
  const { model, layer, pick } = state;
  const { expert } = pick;
  const number = model.moe_layers[layer];
  const run = shownRun();
  heading.textContent = `Expert ${expert} of layer ${number}`;
  const found = aboveChance(run, layer, expert);
  const place = placeOf(layer, expert);
  const lately = state.lately?.layers?.[String(number)]?.load;
  const recent = lately?.some((share) => share > 0)
    ? `Lately, over all that this server answered: ${sayLoad(lately[expert] * model.experts, "load", model.experts)}.` : null;
  fill(
    root,
    runs().map((one) => h("p", {}, took(one, layer, expert))),
    place && h("p", { class: "soft" }, `It is ${place[0]}.`),
    recent && h("p", { class: "soft" }, recent),
    toggle(number, expert),
    found.kinds.length > 0 && [h("h3", {}, `The tokens that it took${state.b ? ` in text ${run.name.toUpperCase()}` : ""}`), table(found), note(found)],
  );
}

/** How many of a text's tokens it took. */
function took(run, layer, expert) {
  const { rows } = run.routing;
  if (!rows) return "It has taken nothing yet: no text was read.";
  const counts = run.routing.counts(layer);
  const share = counts[expert] / rows;
  const even = counts.reduce((sum, value) => sum + value, 0) / rows / counts.length;
  const name = state.b ? `text ${run.name.toUpperCase()}` : "this text";
  return `It took ${count(counts[expert])} of the ${plural(rows, "token")} of ${name}, ${percent(share)}; even would be ${percent(even)}.`;
}

function toggle(number, expert) {
  const off = runs().some((run) => (run.off[number] ?? []).includes(expert));
  const able = state.a.asked !== null && !runs().some((run) => run.status === "busy");
  const why = state.a.file ? "This text came from a file. Ask the model first, then an expert can be turned off."
    : state.a.asked === null ? "Ask the model first, then an expert can be turned off."
    : off ? "The answer without it stands beside the first one." : "Turn it off, and the model answers again without it, beside the first answer.";
  return h("div", { class: "toggle" },
    h("button", {
      class: "switch", type: "button", role: "switch", id: "expert-switch",
      // Not `disabled`: that would take the keyboard's focus away while it answers.
      aria: { checked: !off, disabled: !able, label: `Expert ${expert} of layer ${number}` },
      on: { click: () => able && answerWithout(number, expert, !off) },
    }, h("span", { class: "knob", aria: { hidden: "true" } })),
    h("span", {}, h("strong", {}, off ? "Off" : "On"), ` · ${why}`));
}

function table({ kinds }) {
  const rows = kinds.slice(0, MOST).map((one) =>
    h("tr", { class: one.chance <= EVIDENCE ? "" : "faint" },
      h("th", { scope: "row" }, shown(one.text)), h("td", {}, `${one.taken} of ${one.of}`), h("td", {}, String(Number(one.expected.toPrecision(2)))),
      h("td", {}, `${one.ratio < 10 ? one.ratio.toFixed(1) : Math.round(one.ratio)} ×`)));
  return h("div", { class: "scroll" }, h("table", { class: "took" },
    h("thead", {}, h("tr", {}, ["Token", "Took", "By chance", "Above it"].map((text) => h("th", { scope: "col" }, text)))),
    h("tbody", {}, rows)));
}

function note({ kinds, share }) {
  const sure = kinds.filter((one) => one.chance <= EVIDENCE).length;
  const more = kinds.length > MOST ? ` ${kinds.length - MOST} more are left out.` : "";
  const by = `By chance: its share of all tokens, ${percent(share)}, of each one's count.`;
  const verdict = sure
    ? " Rows in grey could be chance: small numbers are no evidence."
    : " All of this could be chance: small numbers are no evidence.";
  return h("p", { class: "soft" }, by, verdict, more, " An expert is a parameter region, not a topic.");
}
