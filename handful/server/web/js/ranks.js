// The ranks that hold the experts: who is there, what each has computed of late, and what is missing.

import { getJson } from "./api.js";
import { count, fill, find, h, percent, plural, short } from "./dom.js";
import { change, isMixture, state } from "./state.js";

const KEPT = 30; // answers in which something was computed: load "of late" is since the oldest of them

let has = null; // whether the server has ranks; null: not asked yet
let silent = false; // it does not answer
const answers = []; // of GET /ranks: each rank's pid and assignments, by its number
let drawn = "";

/** Ask who is there: nothing of a server whose experts are its own. */
export async function askRanks() {
  if (has === false || document.hidden || !isMixture()) return;
  try {
    const ranks = await getJson("ranks");
    has = ranks.gone !== undefined;
    silent = false;
    if (has) keep(ranks);
    change({ ranks: has ? ranks : null });
  } catch {
    silent = true;
    change();
  }
}

function keep({ ranks }) {
  const now = new Map(ranks.map((one) => [one.rank, one]));
  const last = answers.at(-1);
  const same = last && now.size === last.size && ranks.every((one) => last.get(one.rank)?.assignments === one.assignments);
  if (same) return;
  answers.push(now);
  if (answers.length > KEPT) answers.shift();
}

/** What a rank has computed since the oldest answer that is kept; one that came anew counts from nothing. */
function lately(one) {
  const before = answers.length > 1 ? answers[0].get(one.rank) : null;
  const same = before && before.pid === one.pid && before.assignments <= one.assignments;
  return one.assignments - (same ? before.assignments : 0);
}

const held = (one) => Object.values(one.experts).reduce((sum, experts) => sum + experts.length, 0);

/** The ranks by number, those that are gone among them: {rank, state, there}; there: as the server tells it, or null. */
function rows({ ranks, gone, outages }) {
  const all = new Map(gone.map((rank) => [rank, { rank, state: "gone", there: null }]));
  for (const one of ranks) {
    const ready = one.linked && (held(one) > 0 || one.holdable === 0);
    const again = outages.some((outage) => outage.rank === one.rank);
    all.set(one.rank, { rank: one.rank, state: ready ? "there" : again ? "coming back" : "joining", there: ready ? one : null });
  }
  return [...all.values()].sort((a, b) => a.rank - b.rank);
}

function note({ ranks, degraded }) {
  if (silent) return "The server does not answer: this is what it said last.";
  if (!ranks.some((one) => one.linked)) return "No rank is there: requests wait for one.";
  if (!degraded) return "";
  const { experts, of, loss } = degraded;
  const cost = loss
    ? `the loss is ${Math.abs(loss.more).toFixed(3)} nats a token ${loss.more < 0 ? "lower" : "higher"} (${loss.without.toFixed(3)} beside ${loss.whole.toFixed(3)}, on ${plural(loss.tokens, "token")})`
    : "what that costs is not measured yet";
  return `Answers are made without ${count(experts)} of ${plural(of, "expert")}: ${cost}.`;
}

export function drawRanks() {
  const { ranks } = state;
  const root = find("#ranks");
  root.hidden = !ranks || state.model !== state.served;
  if (root.hidden) return;
  const said = note(ranks);
  if (find("#ranks-note").textContent !== said) find("#ranks-note").textContent = said; // a reader says it once
  const own = rows(ranks).map((row) => ({ ...row, computed: row.there ? lately(row.there) : 0 }));
  const sum = own.reduce((total, row) => total + row.computed, 0);
  const cells = own.map((row) => [row.rank, row.state, sum && row.there ? row.computed / sum : null, ...traffic(row.there)]);
  const now = JSON.stringify(cells);
  if (now === drawn) return;
  drawn = now;
  fill(find("tbody", root), cells.map(([rank, word, share, ...rest]) =>
    h("tr", { class: word === "there" ? "" : "absent" },
      h("th", { scope: "row" }, `${rank} `, h("span", { class: "state" }, word)),
      h("td", {}, share === null ? "–" : percent(share), share !== null && h("span", { class: "bar", css: { "--share": share } })),
      rest.map((text) => h("td", {}, text)))));
}

/** Experts that it holds, bytes to it and from it, and how long the front stood still for it. */
const traffic = (one) =>
  one
    ? [count(held(one)), short(one.bytes_sent, "B"), short(one.bytes_received, "B"), seconds(one.waited_seconds)]
    : Array(4).fill("–");

const seconds = (value) => `${value < 10 ? value.toFixed(2) : count(Math.round(value))}\u00a0s`;
