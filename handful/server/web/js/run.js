// A text that a model read and wrote, with the routing of its tokens. No element is touched here.

import { decode } from "./npy.js";

/** The experts of a text's tokens, and their weights: rows that grow. L MoE layers of E experts, K of them a token.
 *
 * E and above is an assignment that was not computed: its expert was full, or did not choose the token. */
export class Routing {
  constructor(layers, size) {
    this.layers = layers;
    this.size = size; // experts of a layer
    this.topK = 0; // as the first rows have it
    this.rows = 0;
    this.experts = new Uint16Array(0);
    this.weights = null;
    this._experts = null; // with room to grow
    this._weights = null;
    this._counts = new Map(); // layer → {rows, found}
  }

  /** Add the rows of an answer's chunk. Error for another shape than the model's. */
  append(experts, weights) {
    const { shape, data } = decode(experts);
    const given = weights ? decode(weights) : null;
    const [rows, layers, topK] = shape;
    if (shape.length !== 3 || layers !== this.layers) {
      throw new Error(`a routing of shape ${shape.join(" × ")}: tokens × ${this.layers} layers × experts a token`);
    }
    if (given && given.data.length !== data.length) throw new Error("a routing has not as many weights as experts");
    if (rows === 0) return;
    if (this.rows === 0) {
      this.topK = topK;
      this._experts = null;
    }
    if (topK !== this.topK) throw new Error(`a routing of ${topK} experts a token, after ${this.topK}`);
    this._grow(rows, data, given?.data);
  }

  _grow(rows, experts, weights) {
    const width = this.layers * this.topK;
    const need = (this.rows + rows) * width;
    if (this._experts === null || this._experts.length < need) {
      const size = Math.max(need, 2 * (this._experts?.length ?? 64 * width));
      const [e, w] = [new Uint16Array(size), new Float32Array(size)];
      if (this._experts) {
        e.set(this.experts);
        if (this.weights) w.set(this.weights);
      }
      [this._experts, this._weights] = [e, w];
    }
    const known = this.rows === 0 || this.weights !== null;
    this._experts.set(experts, this.rows * width);
    if (weights) this._weights.set(weights, this.rows * width);
    this.rows += rows;
    this.experts = this._experts.subarray(0, need);
    this.weights = weights && known ? this._weights.subarray(0, need) : null;
  }

  /** The experts of a token in a layer, the one with the largest weight first; none if it is not known. */
  at(token, layer) {
    if (token >= this.rows) return [];
    const begin = (token * this.layers + layer) * this.topK;
    const chosen = [];
    for (let i = begin; i < begin + this.topK; i++) {
      if (this.experts[i] < this.size) chosen.push({ expert: this.experts[i], weight: this.weights ? this.weights[i] : null });
    }
    return this.weights ? chosen.sort((a, b) => b.weight - a.weight) : chosen;
  }

  /** The one with the largest weight; null if none is known. */
  first(token, layer) {
    if (token >= this.rows) return null;
    const begin = (token * this.layers + layer) * this.topK;
    let best = null;
    for (let i = begin; i < begin + this.topK; i++) {
      if (this.experts[i] < this.size && (best === null || (this.weights && this.weights[i] > this.weights[best]))) best = i;
    }
    return best === null ? null : this.experts[best];
  }

  took(token, layer, expert) {
    if (token >= this.rows) return false;
    const begin = (token * this.layers + layer) * this.topK;
    for (let i = begin; i < begin + this.topK; i++) if (this.experts[i] === expert) return true;
    return false;
  }

  /** Assignments of each of a layer's experts. They are counted once: a text that grows has its new rows added. */
  counts(layer) {
    const known = this._counts.get(layer) ?? { rows: 0, found: new Float64Array(this.size) };
    for (; known.rows < this.rows; known.rows++) {
      const begin = (known.rows * this.layers + layer) * this.topK;
      for (let i = begin; i < begin + this.topK; i++) if (this.experts[i] < this.size) known.found[this.experts[i]] += 1;
    }
    this._counts.set(layer, known);
    return known.found;
  }

  /** Forget the rows from there on. */
  cut(rows) {
    if (rows >= this.rows) return;
    this._counts.clear();
    const width = this.layers * this.topK;
    this.rows = rows;
    this.experts = this._experts.subarray(0, rows * width);
    this.weights = this.weights && this._weights.subarray(0, rows * width);
  }
}

/** One text. `tokens` are {id, text, drawn}; drawn: the model made it. `turns` are where a speaker begins. */
export class Run {
  constructor(name, model) {
    this.name = name;
    this.model = model;
    this.clear();
  }

  clear() {
    this.tokens = [];
    this.turns = []; // {at, who}
    this.messages = []; // of a chat
    this.routing = new Routing(this.model.moe_layers.length, this.model.experts);
    this.off = {}; // layer number → experts
    this.asked = null; // what made it last
    this.status = "empty"; // empty, busy, done, stopped, failed
    this.note = "";
    this.file = null; // the name of the trace that it came from
  }

  /** Read these tokens next: those that are read already stay, with their routing. */
  read(ids, texts) {
    let same = 0;
    while (same < ids.length && same < this.tokens.length && this.tokens[same].id === ids[same]) same++;
    this.tokens.length = same;
    this.routing.cut(same);
    this.turns = this.turns.filter((turn) => turn.at < same);
    if (same < ids.length) this.turns.push({ at: same, who: "you" });
    ids.slice(same).forEach((id, i) => this.tokens.push({ id, text: texts[same + i] ?? "", drawn: false }));
  }

  get ids() {
    return this.tokens.map((token) => token.id);
  }

  get isOff() {
    return Object.values(this.off).some((experts) => experts.length > 0);
  }

  isExpertOff(layer, expert) {
    return (this.off[this.model.moe_layers[layer]] ?? []).includes(expert);
  }
}
