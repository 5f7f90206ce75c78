// Asking the model: a text grows by an answer, token by token, with the routing of each.

import { events, postJson } from "./api.js";
import { change, isMixture, state } from "./state.js";
import { Run } from "./run.js";

let abort = null; // of all that is being answered

export const stop = () => abort?.abort();

const sampling = () => {
  const number = (id) => {
    const input = document.getElementById(id);
    return input.value.trim() === "" ? null : input.valueAsNumber;
  };
  return { max_tokens: number("max-tokens") ?? 64, temperature: number("temperature"), seed: number("seed") };
};

/** Both texts at once, if there are two. Each asks by what it is given: {prompt}, {messages} or {ids, texts}. */
async function answer(asks) {
  stop();
  const mine = (abort = new AbortController());
  for (const [run] of asks) Object.assign(run, { status: "busy", note: "", file: null, rate: 0, job: mine });
  change({ map: asks.some(([run]) => run === state.a) && state.map === "b" ? "a" : state.map });
  await Promise.all(asks.map(([run, asked]) => one(run, asked, mine)));
  if (abort === mine) abort = null;
  change();
}

async function one(run, asked, job) {
  try {
    const { ids, texts } = await tokens(asked, job.signal);
    await stream(run, { ...asked, ids, texts }, job.signal);
    run.status = "done";
  } catch (error) {
    if (run.job !== job) return; // it is being asked something else already
    const stopped = error.name === "AbortError";
    run.status = stopped ? "stopped" : "failed";
    run.note = stopped ? "Stopped." : error.message;
    if (error.status === 401) change({ key: true });
  }
  if (asked.messages) {
    // What got no answer was not said: it can be sent again.
    const said = drawnText(run);
    run.messages = said ? [...asked.messages, { role: "assistant", content: said }] : asked.messages.slice(0, -1);
  }
  change();
}

/** The tokens of what is asked, and their texts. */
async function tokens(asked, signal) {
  if (asked.ids) return asked;
  const what = asked.messages ? { messages: asked.messages } : { prompt: asked.prompt };
  const found = await postJson("tokenize", { ...what, return_token_strs: true }, signal);
  return { ids: found.tokens, texts: found.token_strs };
}

async function stream(run, asked, signal) {
  const { model } = state;
  run.read(asked.ids, asked.texts);
  run.messages = asked.messages ?? [];
  run.asked = { ...asked };
  change();
  const room = model.context - asked.ids.length;
  if (room < 1) throw new Error(`The text has ${asked.ids.length} tokens, and the model's context ${model.context}: nothing fits after it.`);
  const known = Math.min(run.routing.rows, asked.ids.length - 1);
  run.routing.cut(known);
  const { max_tokens, temperature, seed } = asked.settings;
  const body = {
    prompt: asked.ids,
    max_tokens: Math.max(1, Math.min(max_tokens, room)),
    return_token_ids: true,
    ...(temperature !== null && { temperature }),
    ...(seed !== null && { seed }),
    ...(isMixture() && { return_routed_experts: true, routed_weights: true }),
    ...(isMixture() && known > 0 && { routed_experts_prompt_start: known }),
    ...(run.isOff && { experts_off: run.off }),
  };
  let begun = null;
  let made = 0;
  for await (const event of events("v1/completions", body, signal)) {
    const choice = event.choices?.[0];
    if (!choice) continue;
    if (choice.routed_experts) run.routing.append(choice.routed_experts, choice.routed_weights);
    const ids = choice.token_ids ?? [];
    if (ids.length && !run.turns.some((turn) => turn.who === "model" && turn.at >= asked.ids.length)) {
      run.turns.push({ at: run.tokens.length, who: "model" });
    }
    ids.forEach((id, i) => run.tokens.push({ id, text: i === ids.length - 1 ? choice.text : "", drawn: true }));
    if (!ids.length && choice.text && run.tokens.length > asked.ids.length) run.tokens.at(-1).text += choice.text;
    made += ids.length;
    begun ??= ids.length ? performance.now() : null;
    const seconds = (performance.now() - begun) / 1000;
    if (made > 1 && seconds > 0) run.rate = (made - 1) / seconds;
    if (choice.finish_reason) run.note = finish(choice.finish_reason, made, run, body.max_tokens < max_tokens);
    change();
  }
}

function finish(reason, made, run, full) {
  const rate = run.rate ? `, ${run.rate < 10 ? run.rate.toFixed(1) : Math.round(run.rate)} a second` : "";
  const end = reason === "stop" ? "The model ended it" : full ? "The context is full" : "Cut at the limit";
  return `${end}: ${made} ${made === 1 ? "token" : "tokens"}${rate}.`;
}

/** The text of the last turn, if it is the model's. */
function drawnText(run) {
  const turn = run.turns.at(-1);
  return turn?.who === "model" ? run.tokens.slice(turn.at).map((token) => token.text).join("") : "";
}

/** A new prompt, or in a chat the next message: of the text, and of the one beside it if it has its own. */
export function ask(prompts, chat) {
  const settings = sampling();
  const asks = [];
  const [first, second] = prompts;
  if (first) asks.push([state.a, request(state.a, first, chat, settings)]);
  if (state.two && second) asks.push([state.b, request(state.b, second, chat, settings)]);
  // What stands beside the first answer is the same without an expert: it is asked again too.
  if (!state.two && state.b && first) asks.push([state.b, request(state.b, first, chat, settings)]);
  change({ pick: state.pick?.kind === "token" ? null : state.pick });
  return answer(asks);
}

function request(run, text, chat, settings) {
  if (!chat) return { prompt: text, settings };
  return { messages: [...run.messages, { role: "user", content: text }], settings };
}

/** Go on from where the texts end. */
export function writeOn() {
  const settings = sampling();
  const able = [state.a, state.b].filter((run) => run && run.tokens.length);
  return answer(able.map((run) => [run, { ids: run.ids, texts: run.tokens.map((token) => token.text), settings }]));
}

/** Turn an expert off (or on again) and answer beside the first answer, from the same prompt with the same settings. */
export function answerWithout(layer, expert, off) {
  const { a } = state;
  const before = state.two ? {} : state.b?.off ?? {};
  const others = (before[layer] ?? []).filter((one) => one !== expert);
  const list = off ? [...others, expert].sort((x, y) => x - y) : others;
  const now = { ...before, [layer]: list };
  if (!list.length) delete now[layer];
  if (!Object.keys(now).length) {
    stop();
    change({ b: null, two: false, map: "a" });
    return undefined;
  }
  const b = new Run("b", state.model);
  b.off = now;
  change({ b, two: false });
  return answer([[b, { ...a.asked }]]);
}
