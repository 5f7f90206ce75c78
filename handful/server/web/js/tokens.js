// A text as its tokens, each in the colour of the first expert that it chose in one layer.

import { h, shown } from "./dom.js";
import { hueOf } from "./palette.js";
import { change, isMixture, marked, parting, runs, state } from "./state.js";

const WHO = { completion: { you: "Prompt", model: "Model" }, chat: { you: "You", model: "Model" } };

export class TokensView {
  /** root: a listbox that is empty. */
  constructor(root, slot, readout) {
    this.root = root;
    this.slot = slot; // "a" or "b"
    this.readout = readout;
    this.nodes = [];
    this.ids = [];
    this.at = 0; // which one the keys are on
    this.run = null;
    root.addEventListener("click", (event) => this._pick(this._of(event)));
    root.addEventListener("pointerover", (event) => this._tell(this._of(event)));
    root.addEventListener("pointerleave", () => this._tell(null));
    root.addEventListener("focusin", (event) => this._tell(this._of(event)));
    root.addEventListener("focusout", () => this._tell(null));
    root.addEventListener("keydown", (event) => this._key(event));
  }

  _of(event) {
    const node = event.target.closest(".token");
    return node ? Number(node.dataset.i) : null;
  }

  _pick(index) {
    if (index === null) return;
    this._rove(index);
    const { pick } = state;
    const again = pick?.kind === "token" && pick.run === this.run && pick.index === index;
    change({ pick: again ? null : { kind: "token", run: this.run, index, expert: null } });
  }

  _tell(index) {
    const told = index === null || !this.run?.tokens[index] ? "" : describe(this.run, index);
    if (this.readout.textContent !== told) this.readout.textContent = told;
  }

  _rove(index) {
    if (this.nodes[this.at]) this.nodes[this.at].tabIndex = -1;
    this.at = index;
    if (this.nodes[index]) this.nodes[index].tabIndex = 0;
  }

  _key(event) {
    const last = this.nodes.length - 1;
    const to = { ArrowRight: this.at + 1, ArrowLeft: this.at - 1, Home: 0, End: last, ArrowDown: this._line(1), ArrowUp: this._line(-1) };
    if (event.key in to) {
      this._rove(Math.max(0, Math.min(last, to[event.key])));
      this.nodes[this.at].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      this._pick(this.at);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** The token that stands under or over this one. */
  _line(step) {
    const here = this.nodes[this.at]?.getClientRects()[0];
    if (!here) return this.at;
    let best = this.at;
    let near = null;
    for (let i = this.at + step; i >= 0 && i < this.nodes.length; i += step) {
      const box = this.nodes[i].getClientRects()[0];
      if (!box || (box.top - here.top) * step < 4) continue;
      near ??= box.top;
      if (Math.abs(box.top - near) > 4) break;
      const off = (j) => Math.abs(this.nodes[j].getClientRects()[0].left - here.left);
      if (best === this.at || off(i) < off(best)) best = i;
    }
    return best;
  }

  draw() {
    const run = state[this.slot];
    if (!run) {
      this._cut(0);
      this.run = null;
      return;
    }
    const ids = run.tokens;
    let same = this.run === run ? 0 : -1;
    if (same === 0) while (same < ids.length && same < this.nodes.length && this.ids[same] === ids[same].id) same++;
    this.run = run;
    this._cut(Math.max(0, same));
    for (let i = this.nodes.length; i < ids.length; i++) this._add(run, i);
    const expert = marked();
    const { pick, layer } = state;
    const mixture = isMixture();
    const parts = this.slot === "b" && run.status !== "busy" ? parting() : null;
    this.root.classList.toggle("marking", expert !== null && runs().some((one) => one.routing.counts(layer)[expert] > 0));
    for (let i = 0; i < ids.length; i++) {
      const node = this.nodes[i];
      const first = mixture ? run.routing.first(i, layer) : null;
      const key = `${first}|${hueOf(first)}|${ids[i].text}`;
      if (node.key !== key) {
        node.key = key;
        node.dataset.hue = hueOf(first);
        if (node.text !== ids[i].text) this._text(node, ids[i].text);
        node.setAttribute("aria-label", `${shown(ids[i].text)}${first === null ? "" : `, expert ${first}`}`);
      }
      if (node.parts !== (i === parts)) node.classList.toggle("parts", (node.parts = i === parts));
      const same = expert !== null && run.routing.took(i, layer, expert);
      if (node.same !== same) node.classList.toggle("same", (node.same = same));
      const here = pick?.kind === "token" && pick.run === run && pick.index === i;
      if (node.here !== here) {
        node.here = here;
        node.setAttribute("aria-selected", here);
      }
    }
    this.root.setAttribute("aria-busy", run.status === "busy");
  }

  _cut(length) {
    while (this.nodes.length > length) {
      const node = this.nodes.pop();
      const turn = node.parentElement;
      node.remove();
      if (!turn.querySelector(".token")) turn.remove();
    }
    this.ids.length = length;
    if (this.at >= length) this.at = Math.max(0, length - 1);
    if (this.nodes[this.at]) this.nodes[this.at].tabIndex = 0;
  }

  _add(run, i) {
    const turn = run.turns.findLast((one) => one.at <= i) ?? { at: 0, who: "you" };
    if (turn.at === i || !this.root.lastElementChild) {
      const who = WHO[run.messages.length ? "chat" : "completion"][turn.who];
      this.root.append(h("div", { class: `turn ${turn.who}`, role: "group", aria: { label: who }, data: { who } }));
    }
    const node = h("span", { class: "token", role: "option", tabIndex: i === this.at ? 0 : -1, data: { i } });
    node.setAttribute("aria-selected", "false");
    this._text(node, run.tokens[i].text);
    this.root.lastElementChild.append(node);
    this.nodes.push(node);
    this.ids.push(run.tokens[i].id);
  }

  /** A line's end has a mark, so that it can be seen and touched. */
  _text(node, text) {
    node.text = text;
    node.classList.toggle("part", text === "");
    const parts = text.split("\n");
    node.replaceChildren(...parts.flatMap((part, i) => (i ? [h("i", { class: "nl" }), "\n", part] : [part])));
  }
}

/** A token in one line. */
export function describe(run, index) {
  const text = shown(run.tokens[index].text);
  if (!isMixture()) return text;
  const chosen = run.routing.at(index, state.layer);
  const layer = `layer ${state.model.moe_layers[state.layer]}`;
  if (!chosen.length && index < run.routing.rows) return `${text} in ${layer}: no expert computed it.`;
  if (!chosen.length) return `${text}: the model has not read it yet, so that no expert was chosen for it.`;
  const experts = chosen.map(({ expert, weight }) => `expert ${expert}${weight === null ? "" : ` (${weight.toFixed(2)})`}`);
  return `${text} in ${layer}: ${experts.join(", ")}`;
}
