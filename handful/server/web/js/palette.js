// Eight hues for the experts that a layer used most in the texts on the page; all others are grey. More hues could not be
// told apart. An expert keeps its hue while it is among them, so that a text does not change its colours as it grows.

import { state, runs } from "./state.js";

export const HUES = 8;

const known = { layer: null, run: null, hues: new Map(), others: false };

/** Call once a frame, before `hueOf`. */
export function choose() {
  if (known.layer !== state.layer || known.run !== state.a) known.hues = new Map();
  known.layer = state.layer;
  known.run = state.a;
  const used = new Map();
  for (const run of runs()) {
    for (let i = 0; i < run.routing.rows; i++) {
      const expert = run.routing.first(i, state.layer);
      if (expert !== null) used.set(expert, (used.get(expert) ?? 0) + 1);
    }
  }
  known.others = used.size > HUES;
  const most = [...used].sort((x, y) => y[1] - x[1] || x[0] - y[0]).slice(0, HUES).map(([expert]) => expert);
  for (const expert of known.hues.keys()) if (!most.includes(expert)) known.hues.delete(expert);
  const taken = new Set(known.hues.values());
  const free = Array.from({ length: HUES }, (_, i) => i).filter((hue) => !taken.has(hue));
  for (const expert of most) if (!known.hues.has(expert)) known.hues.set(expert, free.shift());
}

/** A hue's number in the style sheet; "rest" for grey. */
export const hueOf = (expert) => (expert === null || expert === undefined ? "" : String(known.hues.get(expert) ?? "rest"));

/** Whether there are grey ones. */
export const hasOthers = () => known.others;

/** The experts that have a hue, by hue. */
export const legend = () => [...known.hues].sort((x, y) => x[1] - y[1]);
