// A trace: the texts on the page with their routing, as one JSON file, which opens again without a server.

import { encode, decode } from "./npy.js";
import { Run } from "./run.js";
import { change, runs, state } from "./state.js";

const FORMAT = "handful-trace";
const VERSION = 1;

export function toTrace() {
  const texts = runs().map((run) => {
    const { rows, layers, topK } = run.routing;
    const shape = [rows, layers, topK];
    return {
      tokens: run.ids,
      texts: run.tokens.map((token) => token.text),
      turns: run.turns,
      messages: run.messages,
      settings: run.asked?.settings ?? null,
      experts_off: run.off,
      routed_experts: encode(new Uint16Array(run.routing.experts), shape),
      routed_weights: run.routing.weights ? encode(new Float32Array(run.routing.weights), shape) : null,
    };
  });
  return { format: FORMAT, version: VERSION, model: state.model, texts };
}

export function save() {
  const file = new Blob([JSON.stringify(toTrace())], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `${state.model.model.replace(/[^\w.-]+/g, "-")}.trace.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const isWhole = (value) => Number.isSafeInteger(value) && value >= 0;
const wrong = (what) => new Error(`This is no trace that can be shown: ${what}.`);

const MOST = 4096; // experts of a layer that a page would draw

/** What a page shows of a model, out of what a file says of it. */
function described(model) {
  const pair = (value, ...names) => value && names.every((name) => isWhole(value[name]));
  const layers = model?.moe_layers;
  const whole = typeof model?.model === "string" && Array.isArray(layers) && layers.every(isWhole) && isWhole(model.layers)
    && pair(model.parameters, "total", "active") && pair(model.bytes, "total", "token");
  if (!whole) throw wrong("its model is not described");
  const { experts, top_k } = model;
  if (layers.length && !(isWhole(experts) && isWhole(top_k) && top_k >= 1 && top_k <= experts && experts <= MOST)) {
    throw wrong(`its model has ${experts} experts, ${top_k} a token`);
  }
  const { parameters, bytes } = model;
  return { model: model.model, layers: model.layers, moe_layers: layers, experts, top_k, shared: model.shared === true, parameters, bytes, memory: null };
}

/** The texts of a trace's content. Error that says what is wrong with it. */
export function fromTrace(content, name) {
  let trace;
  try {
    trace = JSON.parse(content);
  } catch {
    throw wrong("it is not JSON");
  }
  if (trace?.format !== FORMAT) throw wrong(`its format is not ${FORMAT}`);
  if (trace.version !== VERSION) throw wrong(`its version is ${trace.version}, and this page reads ${VERSION}`);
  const model = described(trace.model);
  const { texts } = trace;
  if (!Array.isArray(texts) || texts.length < 1 || texts.length > 2) throw wrong("it has one text or two");
  return { model, runs: texts.map((text, i) => runOf(text, model, "ab"[i], name)) };
}

function runOf(text, model, slot, name) {
  const run = new Run(slot, model);
  const { tokens, texts, turns, messages, experts_off: off } = text;
  if (!Array.isArray(tokens) || !tokens.every(isWhole)) throw wrong("its tokens are not numbers");
  if (!Array.isArray(texts) || texts.length !== tokens.length || texts.some((one) => typeof one !== "string")) throw wrong("not every token has a text");
  if (!Array.isArray(turns) || !turns.every((turn) => isWhole(turn.at) && ["you", "model"].includes(turn.who))) throw wrong("its turns are wrong");
  run.tokens = tokens.map((id, i) => ({ id, text: texts[i], drawn: turns.findLast((turn) => turn.at <= i)?.who === "model" }));
  run.turns = turns.map(({ at, who }) => ({ at, who }));
  run.messages = Array.isArray(messages) ? messages : [];
  run.off = off && typeof off === "object" ? Object.fromEntries(Object.entries(off).filter(([, list]) => Array.isArray(list))) : {};
  if (model.moe_layers.length) {
    const { shape, data } = decode(String(text.routed_experts));
    if (data.some((expert) => expert >= 2 * model.experts)) throw wrong(`an expert is none of ${model.experts}`);
    if (shape[0] > tokens.length) throw wrong("it has more routings than tokens");
    run.routing.append(text.routed_experts, text.routed_weights ?? undefined);
  }
  run.status = "done";
  run.file = name;
  run.note = `From ${name}, made by ${model.model}.`;
  return run;
}

/** Show a file's texts; the model is then the one that the file describes. */
export async function load(file) {
  const found = fromTrace(await file.text(), file.name);
  const layer = Math.min(state.layer, Math.max(0, found.model.moe_layers.length - 1));
  const [a, b = null] = found.runs;
  change({ model: found.model, a, b, two: b !== null && !b.isOff, layer, pick: null, map: "a", lately: null });
  return found;
}
