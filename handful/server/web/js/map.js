// The map: layers × experts, a cell as full of colour as the expert is loaded. The layer that is chosen stands below it
// as buttons, which are large enough for a finger.

import { css, colours, heatOf, sayLoad } from "./heat.js";
import { fill, find, h, percent, plural } from "./dom.js";
import { choose, hueOf } from "./palette.js";
import { change, isMixture, marked, runs, shownRun, state } from "./state.js";
import { DEAD, ENOUGH, maxVio, relative } from "./stats.js";

const PLACES = { m: ["in memory", "●"], d: ["on disk", "○"], f: ["on its way", "◐"], x: ["missing", "!"] };

/** A layer as the map shows it: {load, kind, dead, each}; load: per expert relative to even, null if nothing ran; each:
 * assignments an expert, null if nobody said. */
function layerOf(layer) {
  const { model } = state;
  const E = model.experts;
  const number = String(model.moe_layers[layer]);
  if (state.map === "lately") {
    const given = state.lately?.layers?.[number];
    const sum = given ? given.load.reduce((a, b) => a + b, 0) : 0;
    const load = sum > 0 ? given.load.map((share) => share * E) : null;
    const each = given?.assignments === undefined ? null : given.assignments / E;
    return { load, kind: "load", each, dead: (e) => load !== null && load[e] < DEAD && (each === null || each >= ENOUGH) };
  }
  const of = (run) => relative(run.routing.counts(layer));
  if (state.map === "difference" && state.b) {
    const [a, b] = [of(state.a), of(state.b)];
    const load = a && b ? b.map((value, e) => value - a[e]) : null;
    return { load, kind: "difference", each: null, dead: () => false };
  }
  const run = shownRun();
  const load = of(run);
  const each = run.routing.counts(layer).reduce((sum, value) => sum + value, 0) / E;
  return { load, kind: "load", each, dead: (e) => load !== null && each >= ENOUGH && load[e] < DEAD };
}

export const placeOf = (layer, expert) => {
  const places = state.lately?.layers?.[String(state.model.moe_layers[layer])]?.places;
  return places ? PLACES[places[expert]] ?? null : null;
};

/** A load of nearly nothing is a dead expert's only after enough assignments. */
const deadWord = (one) => (one.each === null ? "almost no load" : "dead");

const isOff = (layer, expert) => runs().some((run) => run.isExpertOff(layer, expert));

export class MapView {
  constructor() {
    this.canvas = find("#map");
    this.readout = find("#map-readout");
    this.at = { layer: 0, expert: 0 };
    this.palette = null;
    new ResizeObserver(() => change()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
    this.canvas.addEventListener("pointermove", (event) => this._tell(this._cell(event)));
    this.canvas.addEventListener("pointerleave", () => this._tell(null));
    this.canvas.addEventListener("click", (event) => this._pick(this._cell(event)));
    this.canvas.addEventListener("keydown", (event) => this._key(event));
    this.canvas.addEventListener("focus", () => this._tell(this.at));
    this.canvas.addEventListener("blur", () => this._tell(null));
    find("#layer").addEventListener("change", (event) => toLayer(Number(event.target.value)));
    find("#layer-up").addEventListener("click", () => toLayer(state.layer - 1));
    find("#layer-down").addEventListener("click", () => toLayer(state.layer + 1));
    find("#experts").addEventListener("click", (event) => {
      const tile = event.target.closest(".tile");
      if (tile) pickExpert(Number(tile.dataset.expert));
    });
    find("#experts").addEventListener("keydown", (event) => this._tileKey(event));
    for (const input of document.querySelectorAll("input[name=map]")) {
      input.addEventListener("change", () => change({ map: input.value }));
    }
  }

  /** The layers and tiles of another model. */
  begin() {
    const { model } = state;
    this.model = model;
    this.at = { layer: 0, expert: 0 };
    const layers = model.moe_layers.map((number, i) => h("option", { value: i }, `Layer ${number}`));
    fill(find("#layer"), layers);
    const tiles = Array.from({ length: model.experts }, (_, expert) =>
      h("button", { class: "tile", type: "button", data: { expert }, tabIndex: expert ? -1 : 0 },
        h("span", { class: "number" }, String(expert)), h("span", { class: "mark", aria: { hidden: "true" } })));
    fill(find("#experts"), tiles);
    this.tiles = tiles;
    this.canvas.setAttribute("aria-label", `Map of ${plural(model.moe_layers.length, "layer")} by ${model.experts} experts`);
  }

  repaint() {
    this.palette = null;
    change();
  }

  draw() {
    choose();
    if (!isMixture()) return;
    if (this.model !== state.model) this.begin();
    this.palette ??= colours();
    const layers = state.model.moe_layers.map((_, layer) => layerOf(layer));
    this._paint(layers);
    this._tiles(layers[state.layer]);
    this._legend(layers);
    find("#layer").value = String(state.layer);
    find("#layer-up").disabled = state.layer === 0;
    find("#layer-down").disabled = state.layer === layers.length - 1;
    for (const input of document.querySelectorAll("input[name=map]")) {
      const needs = input.value === "b" || input.value === "difference";
      input.parentElement.hidden = needs && !state.b;
      input.checked = input.value === state.map;
      if (input.value === "a") input.nextElementSibling.textContent = state.b ? "Text A" : "This text";
    }
  }

  _geometry() {
    const { model } = state;
    const width = this.canvas.parentElement.clientWidth;
    const rows = model.moe_layers.length;
    const left = 28;
    const row = Math.max(6, Math.min(24, Math.floor(360 / rows)));
    const cell = Math.min(44, (width - left - 4) / model.experts);
    return { width: Math.floor(width), height: row * rows + 2, left, row, cell };
  }

  _paint(layers) {
    const { canvas, palette } = this;
    const g = (this.geometry = this._geometry());
    const scale = devicePixelRatio || 1;
    if (canvas.width !== Math.round(g.width * scale) || canvas.height !== Math.round(g.height * scale)) {
      canvas.width = Math.round(g.width * scale);
      canvas.height = Math.round(g.height * scale);
      canvas.style.width = `${g.width}px`;
      canvas.style.height = `${g.height}px`;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, g.width, g.height);
    const gap = g.cell > 6 ? 1 : 0;
    const every = Math.ceil(14 / g.row);
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    layers.forEach((one, layer) => {
      const top = 1 + layer * g.row;
      const here = layer === state.layer;
      if (here || (layer % every === 0 && Math.abs(layer - state.layer) >= every)) {
        pen.fillStyle = css(here ? palette.ink : palette.muted);
        pen.font = `${here ? "600 " : ""}11px system-ui, sans-serif`;
        pen.fillText(String(state.model.moe_layers[layer]), g.left - 8, Math.max(7, top + g.row / 2));
      }
      for (let e = 0; e < state.model.experts; e++) {
        const x = g.left + e * g.cell;
        const [w, t] = [Math.max(1, g.cell - gap), g.row - (g.row > 8 ? 2 : 1)];
        const place = placeOf(layer, e);
        pen.fillStyle = css(one.load ? heatOf(one.load[e], one.kind, palette) : palette.none);
        pen.fillRect(x, top, w, t);
        if (place === PLACES.d || place === PLACES.f) this._hollow(pen, x, top, w, t, place === PLACES.f);
        if (place === PLACES.x) this._missing(pen, x, top, w, t);
        if (one.dead(e) || isOff(layer, e)) this._cross(pen, x, top, w, t, isOff(layer, e));
      }
    });
    const top = 1 + state.layer * g.row;
    pen.strokeStyle = css(palette.ink);
    pen.lineWidth = 1;
    pen.strokeRect(g.left - 2.5, top - 0.5, g.cell * state.model.experts + 4, g.row - 0.5);
    const { pick } = state;
    if (pick?.kind === "token") {
      this._path(pen, layers.map((_, layer) => pick.run.routing.at(pick.index, layer)));
    }
    const expert = marked();
    if (expert !== null) this._frame(pen, state.layer, expert, palette.ink);
    if (document.activeElement === canvas) this._frame(pen, this.at.layer, this.at.expert, palette.ink);
  }

  _frame(pen, layer, expert, colour) {
    const g = this.geometry;
    pen.strokeStyle = css(colour);
    pen.lineWidth = 2;
    const w = Math.max(6, g.cell);
    pen.strokeRect(g.left + expert * g.cell + g.cell / 2 - w / 2, layer * g.row + 2, w - 1, g.row - 4);
  }

  /** A token's way through all layers: its experts framed, and where there is room a line along the first ones. */
  _path(pen, chosen) {
    const g = this.geometry;
    pen.strokeStyle = pen.fillStyle = css(this.palette.accent);
    if (g.row > 12) {
      pen.lineWidth = 1.5;
      pen.beginPath();
      chosen.forEach((experts, layer) => {
        if (experts.length) pen.lineTo(g.left + (experts[0].expert + 0.5) * g.cell, 1 + (layer + 0.5) * g.row);
      });
      pen.stroke();
    }
    chosen.forEach((experts, layer) => experts.forEach(({ expert }) => {
      if (g.row > 9) this._frame(pen, layer, expert, this.palette.accent);
      else pen.fillRect(g.left + expert * g.cell, 1 + layer * g.row, Math.max(3, g.cell - 1), g.row - 1);
    }));
  }

  /** What is on disk is hollow, and what is on its way half so. */
  _hollow(pen, x, y, w, t, half) {
    const edge = Math.min(w, t) >= 6 ? 2 : 1;
    pen.clearRect(x + edge, y + edge, Math.max(1, w - 2 * edge), half ? (t - 2 * edge) / 2 : t - 2 * edge);
  }

  /** What is missing is an empty place in dashes. */
  _missing(pen, x, y, w, t) {
    pen.clearRect(x, y, w, t);
    pen.strokeStyle = css(this.palette.muted);
    pen.lineWidth = 1;
    pen.setLineDash([2, 2]);
    pen.strokeRect(x + 0.5, y + 0.5, Math.max(1, w - 1), t - 1);
    pen.setLineDash([]);
  }

  /** A dead expert is crossed out; one that is switched off is struck through. */
  _cross(pen, x, y, w, t, off) {
    const [size, cx, cy] = [Math.min(w, t, 10) / 2 - 0.5, x + w / 2, y + t / 2];
    pen.strokeStyle = css(this.palette.ink);
    pen.lineWidth = off ? 2 : 1.25;
    pen.beginPath();
    pen.moveTo(cx - size, cy + (off ? 0 : size));
    pen.lineTo(cx + size, cy - (off ? 0 : size));
    if (!off) {
      pen.moveTo(cx - size, cy - size);
      pen.lineTo(cx + size, cy + size);
    }
    pen.stroke();
  }

  _tiles(one) {
    const chosen = marked();
    const E = state.model.experts;
    this.tiles.forEach((tile, expert) => {
      const value = one.load ? one.load[expert] : null;
      const [dead, off] = [one.dead(expert), isOff(state.layer, expert)];
      const place = placeOf(state.layer, expert);
      const key = [value, one.kind, dead, off, place?.[0], hueOf(expert), chosen === expert, state.layer].join("|");
      if (tile.key === key && tile.palette === this.palette) return;
      tile.key = key;
      tile.palette = this.palette;
      tile.style.backgroundColor = css(value === null ? this.palette.none : heatOf(value, one.kind, this.palette));
      tile.dataset.hue = hueOf(expert) === "rest" ? "" : hueOf(expert);
      tile.classList.toggle("off", off);
      tile.classList.toggle("disk", place === PLACES.d);
      tile.classList.toggle("missing", place === PLACES.x);
      tile.setAttribute("aria-pressed", chosen === expert);
      tile.lastChild.textContent = off ? "–" : place === PLACES.x ? place[1] : dead ? "×" : place ? place[1] : one.kind === "difference" && value ? (value > 0 ? "+" : "−") : "";
      const more = [off && "switched off", dead && deadWord(one), place?.[0]].filter(Boolean);
      tile.setAttribute("aria-label", [`Expert ${expert}`, sayLoad(value, one.kind, E), ...more].join(", "));
    });
  }

  _legend(layers) {
    const one = layers[state.layer];
    const diverging = one.kind === "difference";
    find("#scale").classList.toggle("diverging", diverging);
    find("#scale-from").textContent = diverging ? "less in B" : "unused";
    find("#scale-mid").textContent = diverging ? "the same" : "even";
    find("#scale-to").textContent = diverging ? "more in B" : "4 × even or more";
    let said = "";
    if (one.load === null) {
      said = state.map === "lately" ? "Nothing has run here yet." : "It fills as the model reads and writes.";
    } else if (!diverging) {
      const most = maxVio(one.load);
      said = `The busiest expert of layer ${state.model.moe_layers[state.layer]} has ${(most + 1).toFixed(1)} times the even load (MaxVio ${most.toFixed(1)}). `;
      const dead = Array.from(one.load, (_, e) => one.dead(e)).filter(Boolean).length;
      if (one.each === null) {
        said += dead ? `${plural(dead, "expert")} had almost no load (×).` : "";
      } else if (one.each < ENOUGH) {
        said += `${one.each < 10 ? one.each.toFixed(1) : Math.round(one.each)} assignments an expert: too few to call an unused one dead.`;
      } else {
        said += dead ? `${plural(dead, "dead expert")} (×).` : "No dead expert.";
      }
    }
    find("#map-note").textContent = said;
    find("#places").hidden = !state.lately || !Object.values(state.lately.layers ?? {}).some((layer) => layer.places);
    find("#places").textContent = state.ranks
      ? "On the ranks: ● full cell: in memory · ○ hollow: on disk · ! dashed: missing."
      : "Under the memory budget: ● full cell: in memory · ○ hollow: on disk · ◐ half: on its way.";
  }

  _cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const g = this.geometry;
    if (!g) return null;
    const layer = Math.floor((event.clientY - box.top - 1) / g.row);
    const expert = Math.floor((event.clientX - box.left - g.left) / g.cell);
    const inside = layer >= 0 && layer < state.model.moe_layers.length && expert >= 0 && expert < state.model.experts;
    return inside ? { layer, expert } : null;
  }

  _tell(cell) {
    let told = "";
    if (cell) {
      const one = layerOf(cell.layer);
      const place = placeOf(cell.layer, cell.expert);
      const value = one.load ? one.load[cell.expert] : null;
      told = `Layer ${state.model.moe_layers[cell.layer]}, expert ${cell.expert}: ${sayLoad(value, one.kind, state.model.experts)}`;
      if (place) told += `, ${place[0]}`;
      if (one.dead(cell.expert)) told += `, ${deadWord(one)}`;
      if (isOff(cell.layer, cell.expert)) told += ", switched off";
    }
    this.readout.textContent = told;
  }

  _pick(cell) {
    if (!cell) return;
    this.at = cell;
    change({ layer: cell.layer });
    pickExpert(cell.expert, true);
  }

  _key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    if (step) {
      this.at = {
        layer: within(this.at.layer + step[0], state.model.moe_layers.length),
        expert: within(this.at.expert + step[1], state.model.experts),
      };
      this._tell(this.at);
      change();
    } else if (event.key === "Enter" || event.key === " ") {
      this._pick(this.at);
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Arrow keys among the tiles: one of them is in the order of the tab key. */
  _tileKey(event) {
    const tile = event.target.closest(".tile");
    if (!tile) return;
    const at = Number(tile.dataset.expert);
    const columns = this.tiles.findIndex((one) => one.offsetTop > this.tiles[0].offsetTop);
    const down = columns > 0 ? columns : this.tiles.length;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - down, ArrowDown: at + down, Home: 0, End: this.tiles.length - 1 };
    const next = this.tiles[to[event.key]];
    if (!(event.key in to)) return;
    event.preventDefault();
    if (!next) return;
    tile.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

export function toLayer(layer) {
  if (layer < 0 || layer >= state.model.moe_layers.length) return;
  const { pick } = state;
  // A token stays chosen in the other layer; an expert is another one there.
  change({ layer, pick: pick?.kind === "token" ? { ...pick, expert: null } : null });
}

export function pickExpert(expert, always = false) {
  const again = !always && state.pick?.kind === "expert" && state.pick.expert === expert;
  change({ pick: again ? null : { kind: "expert", expert } });
}
