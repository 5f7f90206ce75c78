// The load of every expert over a training: the strip and its player, the small charts, the table.

// Load, layer × expert, over time
// ----------------------------------------------------------------------------------------------------

const DEAD = 0.01; // of the even load: an expert below this counts as dead, as in the run's own statistics

function heatColor(ratio) {
  const t = clamp(Math.log2(ratio) / 3, -1, 1);
  return `color-mix(in oklab, var(${t < 0 ? "--cold" : "--hot"}) ${(Math.abs(t) * 100).toFixed(0)}%, var(--even))`;
}

// Neighbours in depth look alike.
function layerColor(l, count) {
  return `color-mix(in oklab, var(--hot) ${count > 1 ? (100 * l) / (count - 1) : 50}%, var(--cold))`;
}

function routing(team, id) {
  const section = document.getElementById("load").content.cloneNode(true).firstElementChild;
  const title = section.querySelector("h2");
  title.id = `h-load-${id}`;
  title.append(team.label);
  section.setAttribute("aria-labelledby", title.id);
  document.getElementById("sample").before(section);

  const { steps, tokens } = team.routing;
  const last = steps.length - 1;
  const sliderId = `step-${id}`;
  const slider = html("input", { type: "range", min: 0, max: last, id: sliderId });
  const when = html("output", { for: sliderId });
  const play = html("button", { type: "button", class: "play" }, "▶ Play");
  if (last)
    section.append(html("div", { class: "step" }, play, html("label", { for: sliderId }, "Step"), slider, when));
  const views = [
    heatMap(section, team.routing),
    ...(last ? [layerCharts(section, team, show)] : []),
    layerTable(section, team.routing),
  ];

  // Some ten seconds from the first step to the last, whatever their number. It moves when it is asked to, and only then.
  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
  }
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    let at = Number(slider.value) === last ? 0 : Number(slider.value);
    show(at);
    play.textContent = "■ Stop";
    timer = setInterval(
      () => {
        show(++at);
        if (at >= last) stop();
      },
      clamp(10000 / last, 50, 500),
    );
  });

  function show(step) {
    const text = `step ${steps[step].toLocaleString("en")} · ${si(tokens[step])} tokens`;
    slider.value = step;
    slider.setAttribute("aria-valuetext", text);
    when.textContent = text;
    for (const view of views) view(step, text);
  }
  slider.addEventListener("input", () => {
    stop();
    show(Number(slider.value));
  });
  show(last);
}

// Each of these three adds itself to the section and returns what shows another step.

function heatMap(section, { load, layers }) {
  const plot = html("div");
  const readout = html("p", { class: "readout", role: "status" });
  section.append(plot, readout, heatScale());
  const help = "Load of every expert; arrow keys move from cell to cell";
  const root = svg("svg", { class: "plot heat", tabindex: 0, role: "application", "aria-label": help });
  const ring = svg("rect", { class: "cell-focus", visibility: "hidden" });
  plot.append(root);
  const experts = highest(load[0].map((row) => row.length));
  let now = 0;
  let focus = null; // [layer, expert]
  let cells = []; // [layer][expert] {rect, cross}
  let grid = null; // {width, left, top, head, columns, block, w, h}: a layer's block, and a cell in it, in pixels

  // Where a row of all experts would have cells too small for a finger, a layer's experts stand in several rows.
  function draw() {
    const width = plot.clientWidth;
    if (!width) return;
    const least = width < 560 || matchMedia("(pointer: coarse)").matches ? 26 : 6;
    const wraps = (width - 60) / experts < least;
    const left = wraps ? 1 : 58;
    const columns = wraps ? Math.min(experts, Math.max(1, Math.floor((width - 2) / least))) : experts;
    const w = Math.min((width - left - 2) / columns, wraps ? 44 : 90);
    const h = wraps ? Math.max(least, 20) : clamp(w * 1.6, layers.length > 12 ? 10 : 22, 40);
    const head = wraps ? 22 : 0;
    const rows = Math.ceil(experts / columns);
    const block = head + rows * h + (wraps ? 8 : 0);
    const top = 4;
    const bottom = top + layers.length * block;
    const middle = { "text-anchor": "middle" };
    grid = { width, left, top, head, columns, block, w, h };
    root.setAttribute("viewBox", `0 0 ${width} ${bottom + (wraps ? 0 : 38)}`);
    root.replaceChildren();
    cells = load[0].map((row, l) => row.map((_, e) => cell(l, e)));
    const every = wraps ? 1 : Math.ceil(14 / h);
    for (let l = 0; l < layers.length; l += every)
      root.append(
        wraps
          ? svg(
              "text",
              { x: left, y: top + l * block + 15 },
              `layer ${layers[l]}, experts 0 to ${load[0][l].length - 1}`,
            )
          : svg("text", { x: left - 8, y: top + (l + 0.5) * h + 4, "text-anchor": "end" }, `layer ${layers[l]}`),
      );
    if (!wraps) {
      for (const e of ticks(0, experts - 1, clamp(width / 70, 2, 16)).filter(Number.isInteger))
        root.append(svg("text", { x: left + (e + 0.5) * w, y: bottom + 16, ...middle }, String(e)));
      root.append(svg("text", { x: left + (experts * w) / 2, y: bottom + 33, ...middle }, "expert"));
    }
    root.append(ring);
    paint();
  }

  const corner = (l, e) => ({
    x: grid.left + (e % grid.columns) * grid.w,
    y: grid.top + l * grid.block + grid.head + Math.floor(e / grid.columns) * grid.h,
  });

  function cell(l, e) {
    const { w, h } = grid;
    const gap = w > 5 ? 1 : 0;
    const { x: x0, y: y0 } = corner(l, e);
    const [x1, y1] = [x0 + w - gap, y0 + h - gap];
    const rect = svg("rect", { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    const cross = svg("path", { class: "cross", d: `M${x0 + gap},${y1 - gap}L${x1 - gap},${y0 + gap}` });
    root.append(rect, cross);
    return { rect, cross };
  }

  function paint() {
    cells.forEach((row, l) =>
      row.forEach(({ rect, cross }, e) => {
        const ratio = load[now][l][e] * row.length;
        const alive = ratio >= DEAD;
        rect.setAttribute("class", alive ? "cell" : "cell dead");
        rect.style.fill = alive ? heatColor(ratio) : "";
        cross.setAttribute("visibility", alive ? "hidden" : "visible");
      }),
    );
    point();
  }

  function point() {
    if (!focus) {
      readout.textContent = "Point at a cell, touch it, or use the arrow keys to read its load.";
      return;
    }
    const [l, e] = focus;
    const even = 1 / load[now][l].length;
    const share = load[now][l][e];
    const percent = (v) => (known(v) ? `${(100 * v).toFixed(2)} %` : "unknown");
    readout.textContent =
      `Layer ${layers[l]}, expert ${e}: ${percent(share)} of assignments, ` +
      `${fixed(known(share) ? share / even : null, 2)}× the even load (${percent(even)}).`;
    const place = { ...corner(l, e), width: grid.w, height: grid.h, visibility: "visible" };
    for (const [name, value] of Object.entries(place)) ring.setAttribute(name, value);
  }

  function look(l, e) {
    const layer = clamp(l, 0, layers.length - 1);
    focus = [layer, clamp(e, 0, load[now][layer].length - 1)];
    point();
  }
  function under(x, y) {
    const l = clamp(Math.floor((y - grid.top) / grid.block), 0, layers.length - 1);
    const row = Math.max(0, Math.floor((y - grid.top - l * grid.block - grid.head) / grid.h));
    return [l, row * grid.columns + clamp(Math.floor((x - grid.left) / grid.w), 0, grid.columns - 1)];
  }
  lookAt(root, { grid: () => grid, cell: under, focus: () => focus, look });
  new ResizeObserver(draw).observe(plot);
  draw();
  return (step) => {
    now = step;
    paint();
  };
}

function heatScale() {
  const names = { 0.125: "⅛", 0.25: "¼", 0.5: "½", 1: "1, even", 2: "2", 4: "4", 8: "8 or more" };
  const scale = html("p", { class: "scale" }, "load ÷ even load:");
  for (const ratio of [0.125, 0.25, 0.5, 1, 2, 4, 8])
    scale.append(html("span", {}, html("i", { style: `background:${heatColor(ratio)}` }), names[ratio]));
  scale.append(html("span", {}, html("i", { class: "dead" }), "dead: below 1 %"));
  return scale;
}

function layerCharts(section, team, show) {
  const { steps, tokens, max_vio: maxVio, dead, entropy, layers } = team.routing;
  const host = html("div", { class: "trio" });
  section.append(host);
  // The first steps, before the balance takes hold, would flatten the rest: what stands above the chart is said beside
  // it. Where a warning speaks of a peak, all of it is there.
  function tall(values) {
    const late = highest(values.slice(Math.floor(values.length / 4)).flat(), 0);
    const all = highest(values.flat(), 0);
    if (team.warned || all <= 3 * late) return { high: Math.max(1, 1.05 * all), above: "" };
    const at = values.findIndex((each) => highest(each) === all);
    return { high: Math.max(1, 1.15 * late), above: ` Early on it was up to ${fixed(all, 1)}, at step ${steps[at]}.` };
  }
  const nearest = (v) => tokens.reduce((best, t, i) => (Math.abs(t - v) < Math.abs(tokens[best] - v) ? i : best), 0);
  const kinds = [
    {
      title: "MaxVio",
      word: term("MaxVio"),
      note: "How far the busiest expert is above the even load; 0 is even.",
      values: maxVio,
      low: 0,
      ...tall(maxVio),
      digits: 2,
    },
    {
      title: "Dead experts",
      word: term("dead expert", "Dead experts"),
      note: "Experts below 1 % of the even load.",
      values: dead,
      low: 0,
      ...tall(dead),
      digits: 0,
    },
    {
      title: "Entropy of the load",
      note: "1 is even; 0 is one expert for all.",
      values: entropy,
      low: lowest(entropy.flat(), 0.92) - 0.02,
      high: 1,
      digits: 2,
    },
  ];
  const charts = kinds.map(({ title, word = title, note, values, low, high, above = "", digits }) => {
    const plot = html("div");
    host.append(html("div", {}, html("h3", {}, word), html("p", {}, note, above), plot));
    const reading = (i) => layers.map((layer, l) => `layer ${layer} ${fixed(values[i][l], digits)}`).join(", ");
    return lineChart(plot, {
      name: `${title} per layer against training tokens`,
      series: layers.map((layer, l) => ({
        label: String(layer),
        color: layerColor(l, layers.length),
        points: tokens.map((x, i) => ({ x, y: values[i][l] })),
      })),
      x: { low: 0, high: tokens.at(-1) || 1, name: "training tokens", tick: (v) => si(v, { exact: true }) },
      y: { low, high, tick: (v) => String(Number(v.toFixed(2))) },
      height: 170,
      labels: layers.length <= 8,
      sticky: true,
      tell: (v) => show(nearest(v)),
      say: (v) => `step ${steps[nearest(v)]}: ${reading(nearest(v))}`,
    });
  });
  if (team.stability.length > 1) charts.push(stabilityChart(host, team, show, nearest));
  return (step) => charts.forEach((chart) => chart.move(tokens[step]));
}

function stabilityChart(host, { stability, routing: { tokens, layers } }, show, nearest) {
  const plot = html("div");
  const note = "Of one held-out text, the share of choices that are those of the evaluation before.";
  host.append(html("div", {}, html("h3", {}, term("stability", "Stability")), html("p", {}, note), plot));
  const reading = (v) => {
    const now = stability.findLast((each) => each.tokens <= v) ?? stability[0];
    return `step ${now.step}: ${layers.map((layer, l) => `layer ${layer} ${fixed(100 * now.kept[l], 0)} %`).join(", ")}`;
  };
  return lineChart(plot, {
    name: "Routing stability per layer against training tokens",
    series: layers.map((layer, l) => ({
      label: String(layer),
      color: layerColor(l, layers.length),
      points: stability.map((each) => ({ x: each.tokens, y: each.kept[l] })),
    })),
    x: { low: 0, high: tokens.at(-1) || 1, name: "training tokens", tick: (v) => si(v, { exact: true }) },
    y: { low: 0, high: 1, tick: (v) => `${Math.round(100 * v)} %` },
    height: 170,
    labels: layers.length <= 8,
    sticky: true,
    tell: (v) => show(nearest(v)),
    say: reading,
  });
}

function layerTable(section, { load, max_vio: maxVio, dead, entropy, dropped, layers }) {
  const anyDropped = dropped.flat().some((share) => share > 0);
  const heads = ["Layer", "MaxVio", "Dead", "Entropy", ...(anyDropped ? ["Dropped"] : [])];
  const caption = html("caption");
  const head = html("thead", {}, html("tr", {}, ...heads.map((name) => html("th", { scope: "col" }, name))));
  const body = html("tbody");
  const box = { class: "scroll layers-box", tabindex: 0, role: "region", "aria-label": "Statistics of each layer" };
  section.append(html("div", box, html("table", { class: "layers" }, caption, head, body)));
  return (step, text) => {
    caption.textContent = `At ${text}`;
    body.replaceChildren(
      ...layers.map((layer, l) => {
        const values = [
          fixed(maxVio[step][l], 2),
          `${fixed(dead[step][l], 0)} of ${load[step][l].length}`,
          fixed(entropy[step][l], 3),
          ...(anyDropped ? [`${fixed(100 * dropped[step][l], 1)} %`] : []),
        ];
        const name = html("th", { scope: "row" }, swatch(layerColor(l, layers.length)), String(layer));
        return html("tr", {}, name, ...values.map((value) => html("td", {}, value)));
      }),
    );
  };
}
