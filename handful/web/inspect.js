// Draws what inspection/page.py put into the page as JSON: maps of experts. No libraries, nothing is fetched.
// Colours are CSS variables, so that a change of theme needs no redrawing.

const page = JSON.parse(document.getElementById("data").textContent);

const percent = (value, digits = 2) => {
  const number = 100 * value;
  return `${Math.abs(number) < 1 ? Number(number.toPrecision(digits)).toString() : number.toFixed(1)} %`;
};
const small = (q) => (q < 0.001 ? q.toExponential(0) : q.toFixed(3));
const mixed = (color, share) => `color-mix(in oklab, var(${color}) ${(100 * clamp(share, 0, 1)).toFixed(0)}%, var(--even))`;

// What each kind of map shows: its title, the colour of a value ("not": none), its words, and its legend.
// ----------------------------------------------------------------------------------------------------

const DEAD = 0.01; // of the even load

const LEAST = 4; // pixels of a cell's width
const flat = (map) => map.cells.flat(2).filter((cell) => cell !== null);
const most = (values) => values.reduce((a, b) => Math.max(a, b), 0);
const swatch = (style, text, kind = "") => html("span", {}, html("i", { class: kind, style }), text);

const KINDS = {
  load(map) {
    const shown = { 0.125: "⅛", 0.25: "¼", 0.5: "½", 1: "1, even", 2: "2", 4: "4", 8: "8 or more" };
    const color = (ratio) => mixed(ratio < 1 ? "--cold" : "--hot", Math.abs(clamp(Math.log2(ratio) / 3, -1, 1)));
    return {
      title: "Load",
      note: "The share of all assignments, beside the even one.",
      color: (cell, row) => (cell * row.length < DEAD ? null : color(cell * row.length)),
      say: (cell, row) =>
        `${percent(cell, 3)} of assignments, ${(cell * row.length).toFixed(2)}× the even load` +
        (cell * row.length < DEAD ? ": dead." : "."),
      legend: [
        "load ÷ even load:",
        ...[0.125, 0.25, 0.5, 1, 2, 4, 8].map((ratio) => swatch(`background:${color(ratio)}`, shown[ratio])),
        swatch("", "dead: below 1 %", "dead"),
      ],
    };
  },
  follow(map) {
    const top = most(flat(map).map(([share, , , , follows]) => (follows ? share : 0))) || 1;
    const color = (share) => mixed("--moe", 0.12 + 0.88 * Math.sqrt(Math.max(0, share) / top));
    const shares = [0.05, 0.25, 1].map((part) => part * top);
    return {
      title: `Follows ${map.name}`,
      note: `How much of when an expert is chosen ${map.name} explains.`,
      color: (cell) => (cell === null ? null : cell[4] ? color(cell[0]) : "not"),
      say(cell) {
        if (cell === null) return "used too seldom to be judged.";
        const [share, chance, agreement, q, follows, labels] = cell;
        const lifts = labels.map(([label, one, two]) => `“${label}” ${one.toFixed(1)}× and ${two.toFixed(1)}×`);
        return (
          `${map.name} explains ${percent(share)} (chance ${percent(chance)}), the halves agree by r = ` +
          `${agreement.toFixed(2)}, q = ${small(q)}: ${follows ? "beyond chance." : "not beyond chance."}` +
          (lifts.length ? ` Most by, in each half: ${lifts.join(", ")}.` : "")
        );
      },
      legend: [
        "share explained:",
        ...shares.map((share) => swatch(`background:${color(share)}`, percent(share))),
        swatch("", "not beyond chance", "not"),
        swatch("", "too seldom to be judged", "dead"),
      ],
    };
  },
  cost(map) {
    const top = most(flat(map).map(([cost, , , beyond]) => (beyond ? Math.abs(cost) : 0))) || 1;
    const color = (cost) => mixed(cost < 0 ? "--cold" : "--hot", 0.12 + 0.88 * Math.sqrt(Math.abs(cost) / top));
    return {
      title: "Cost when switched off",
      note: "The loss without this expert, less the loss with all, in nats a token.",
      color: (cell) => (cell === null ? null : cell[3] ? color(cell[0]) : "not"),
      say(cell) {
        if (cell === null) return "not measured.";
        const [cost, error, q, beyond] = cell;
        const noise = error === null ? "" : ` ± ${error.toFixed(4)}`;
        return `${cost.toFixed(4)}${noise} nats a token, q = ${small(q)}: ${beyond ? "beyond noise." : "within noise."}`;
      },
      legend: [
        "nats a token:",
        ...[0.05, 0.25, 1].map((part) => swatch(`background:${color(part * top)}`, (part * top).toFixed(4))),
        swatch(`background:${color(-top)}`, "lower without it"),
        swatch("", "within noise", "not"),
        swatch("", "not measured", "dead"),
      ],
    };
  },
};

// A map: layers down, experts across
// ----------------------------------------------------------------------------------------------------

function heat(host, readout, name, layers, cells, kind) {
  const root = svg("svg", { class: "plot heat", tabindex: 0, role: "application", "aria-label": name });
  const ring = svg("rect", { class: "cell-focus", visibility: "hidden" });
  const plot = html("div", { class: "scroll" }, root);
  host.append(plot);
  const experts = most(cells.map((row) => row.length));
  let focus = null; // [layer, expert]
  let grid = null; // {width, left, top, w, h} of a cell, in pixels

  function draw() {
    if (!plot.clientWidth) return;
    const [left, top] = [58, 4];
    const width = Math.max(plot.clientWidth, left + 2 + LEAST * experts); // wider than the screen: it scrolls
    root.style.width = `${width}px`;
    const w = (width - left - 2) / experts;
    const h = clamp(w * 1.6, layers.length > 12 ? 10 : 18, 32);
    const bottom = top + layers.length * h;
    grid = { width, left, top, w, h };
    root.setAttribute("viewBox", `0 0 ${width} ${bottom + 36}`);
    root.replaceChildren();
    const gap = w > 7 ? 1 : 0;
    cells.forEach((row, l) =>
      row.forEach((value, e) => {
        const color = kind.color(value, row);
        const place = { x: left + e * w, y: top + l * h, width: w - gap, height: h - gap };
        const rect = svg("rect", { ...place, class: `cell${color === null ? " dead" : color === "not" ? " not" : ""}` });
        if (color !== null && color !== "not") rect.style.fill = color;
        root.append(rect);
        if (color === null)
          root.append(
            svg("path", {
              class: "cross",
              d: `M${place.x + 1},${place.y + place.height - 1}L${place.x + place.width - 1},${place.y + 1}`,
            }),
          );
      }),
    );
    const every = Math.ceil(14 / h);
    for (let l = 0; l < layers.length; l += every)
      root.append(svg("text", { x: left - 8, y: top + (l + 0.5) * h + 4, "text-anchor": "end" }, `layer ${layers[l]}`));
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find((s) => s * w > 34) ?? 256;
    for (let e = 0; e < experts; e += step)
      root.append(svg("text", { x: left + (e + 0.5) * w, y: bottom + 15, "text-anchor": "middle" }, String(e)));
    root.append(svg("text", { x: left + (experts * w) / 2, y: bottom + 31, "text-anchor": "middle" }, "expert"), ring);
    point(false);
  }

  // A map that is only drawn anew, by a change of width, leaves what was last read.
  function point(tell) {
    if (!focus) return;
    const [l, e] = focus;
    if (tell) readout.textContent = `${kind.side ?? ""}Layer ${layers[l]}, expert ${e}: ${kind.say(cells[l][e], cells[l])}`;
    const { left, top, w, h } = grid;
    const place = { x: left + e * w, y: top + l * h, width: w, height: h, visibility: "visible" };
    for (const [key, value] of Object.entries(place)) ring.setAttribute(key, value);
  }

  function look(l, e) {
    const layer = clamp(l, 0, layers.length - 1);
    focus = [layer, clamp(e, 0, cells[layer].length - 1)];
    point(true);
  }
  lookAt(root, {
    grid: () => grid,
    cell: (x, y) => [Math.floor((y - grid.top) / grid.h), Math.floor((x - grid.left) / grid.w)],
    focus: () => focus,
    look,
  });
  new ResizeObserver(draw).observe(plot);
  draw();
}

function maps(host) {
  for (const map of page.maps) {
    const kind = KINDS[map.kind](map);
    const box = html("div", { class: "map", id: `map-${map.id}` });
    box.append(html("h3", {}, kind.title), html("p", { class: "how" }, kind.note));
    box.append(html("p", { class: "scale" }, ...kind.legend));
    const sides = html("div", { class: "map-sides" });
    box.append(sides);
    host.append(box);
    const readout = html("p", { class: "readout", role: "status" });
    map.cells.forEach((cells, i) => {
      const side = html("div");
      sides.append(side);
      const named = page.names.length > 1;
      if (named) side.append(html("p", { class: "side" }, page.names[i]));
      const label = `${kind.title} of every expert${named ? `, ${page.names[i]}` : ""}; arrow keys move from cell to cell`;
      heat(side, readout, label, page.layers[i], cells, named ? { ...kind, side: `${page.names[i]}: ` } : kind);
    });
    box.append(readout);
  }
}

theme(document.getElementById("theme"));
maps(document.getElementById("maps"));
