// What the page shows, in one place. Who changes it says so; who draws is called once a frame.

import { onFrame } from "./dom.js";

export const state = {
  served: null, // the server's model, as GET /routing/model describes it
  model: null, // the one whose texts are shown: the same, but for a trace of another
  a: null, // the text; a Run
  b: null, // the one beside it, or null
  two: false, // b has a prompt of its own
  layer: 0, // that colours the text: an index into model.moe_layers
  pick: null, // {kind: "token", run, index, expert} or {kind: "expert", expert}; expert null: the token's first
  map: "a", // what the map shows: a, b, difference or lately
  lately: null, // as GET /routing/experts answered
  ranks: null, // as GET /ranks answered; null: the server has none
  key: false, // the server asks for a key
};

const drawers = [];
const draw = onFrame(() => drawers.forEach((drawer) => drawer(state)));

/** `drawer` is called with the state in the frame after each change. */
export const drawn = (drawer) => drawers.push(drawer);

export function change(values = {}) {
  Object.assign(state, values);
  draw();
}

export const runs = () => [state.a, state.b].filter(Boolean);

/** The run that a map, a palette or an expert's page is of, when one is: b where the map shows b. */
export const shownRun = () => (state.map === "b" && state.b ? state.b : state.a);

export const isMixture = () => state.model !== null && state.model.moe_layers.length > 0;

/** The expert whose tokens are marked in the text, in the layer that colours it; null for none. */
export function marked() {
  const { pick, layer } = state;
  if (!pick || !isMixture()) return null;
  if (pick.kind === "expert") return pick.expert;
  return pick.expert ?? pick.run.routing.first(pick.index, layer);
}

/** The first token at which the answer without some experts is another one than A; null where there is none beside it. */
export function parting() {
  const { a, b } = state;
  const from = b?.asked?.ids.length;
  if (!b?.isOff || from === undefined || a.asked?.ids.length !== from) return null;
  let at = from;
  while (at < a.tokens.length && at < b.tokens.length && a.tokens[at].id === b.tokens[at].id) at++;
  return at;
}
