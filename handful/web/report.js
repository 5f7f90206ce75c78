// Draws what report.py put into the page as JSON: curves, load, text. No libraries, nothing is fetched.
// Colours are CSS variables, so that a change of theme needs no redrawing.

const report = JSON.parse(document.getElementById("data").textContent);

// elements and numbers
// ----------------------------------------------------------------------------------------------------

const known = (value) => typeof value === "number" && Number.isFinite(value);
const fixed = (value, digits) => (known(value) ? value.toFixed(digits) : "—");
// Math.max(...values) would run out of stack on long lists.
const highest = (values, floor = -Infinity) => values.reduce((a, b) => (known(b) ? Math.max(a, b) : a), floor);
const lowest = (values, ceiling = Infinity) => values.reduce((a, b) => (known(b) ? Math.min(a, b) : a), ceiling);
const swatch = (color) => html("i", { class: "swatch", style: `--c:${color}` });

// 4096000 -> "4.10 M". `digits` significant ones; trailing zeros go when `exact` (axis ticks).
function si(value, { digits = 3, exact = false } = {}) {
  if (!known(value)) return "—";
  const steps = [
    [1e18, "E"],
    [1e15, "P"],
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ];
  const [scale, prefix] = steps.find(([least]) => Math.abs(value) >= least * 0.9995) ?? [1, ""];
  const scaled = value / scale;
  const text = Number.isInteger(scaled) && !prefix ? String(scaled) : scaled.toPrecision(digits);
  const number = Number(text);
  const shown = exact || Math.abs(number) >= 10 ** digits ? String(number) : text;
  return prefix ? `${shown}\u202f${prefix}` : shown;
}

function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw * 0.999) * power;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) all.push(m * 10 ** power);
  return all.filter((value) => value >= low && value <= high);
}

// The height of a series at x, read off its straight lines as they are drawn; null outside of them.
function at(points, x, key = "y", log = false) {
  const i = points.findIndex((point) => point.x >= x);
  if (i < 0) return null;
  const right = points[i];
  if (right.x === x) return known(right[key]) ? right[key] : null;
  const left = points[i - 1];
  if (!left || !known(left[key]) || !known(right[key])) return null;
  const share = log ? Math.log(x / left.x) / Math.log(right.x / left.x) : (x - left.x) / (right.x - left.x);
  return left[key] + (right[key] - left[key]) * share;
}

// The line chart
// ----------------------------------------------------------------------------------------------------

// chart:
//   name          what it shows, for screen readers
//   series        [{label, short, color, dash, points: [{x, y, low, high}]}]; `short` where there is little room
//   x, y          {low, high, log, name, tick(value)}
//   height        in pixels; the width is the host's, and is followed
//   labels        whether each line's label stands at its end
//   lines         [{y, name, short}]: dotted lines across
//   marks         [{x, y, color}]: rings
//   sticky        the cursor stays where it was put
//   tell(x)       hears where the pointer or the arrow keys went; null: away
//   say(x)        the values there in words
// Returns {move(x)}, which puts the cursor there without telling.
function lineChart(host, chart) {
  const { series, x, y, height, lines = [], marks = [] } = chart;
  const clip = `clip-${(lineChart.count = (lineChart.count ?? 0) + 1)}`;
  const root = svg("svg", { class: "plot", tabindex: 0, role: "slider", "aria-label": chart.name });
  const cursorLine = svg("line", { class: "cursor", visibility: "hidden" });
  const dots = svg("g");
  host.append(root);
  // The arrow keys go from one measured point to the next.
  const stops = [...new Set(series.flatMap((s) => s.points.map((p) => p.x)))]
    .filter((stop) => stop >= x.low && stop <= x.high)
    .sort((a, b) => a - b);
  let cursor = null;
  let frame = null; // {width, left, top, w, h}: the plot inside the margins

  const along = (v) => {
    const share = x.log ? Math.log(v / x.low) / Math.log(x.high / x.low) : (v - x.low) / (x.high - x.low || 1);
    return frame.left + frame.w * share;
  };
  const back = (px) => {
    const share = clamp((px - frame.left) / frame.w, 0, 1);
    return x.log ? x.low * (x.high / x.low) ** share : x.low + share * (x.high - x.low);
  };
  const up = (v) => frame.top + (frame.h * (y.high - v)) / (y.high - y.low || 1);
  const drawable = (p) => known(p.y) && known(p.x) && !(x.log && p.x <= 0);

  function draw() {
    const width = host.clientWidth;
    if (!width) return;
    const narrow = width < 480;
    const labels = series.map((s) => (narrow ? (s.short ?? s.label) : s.label));
    const left = 44;
    const top = y.name ? 26 : 10;
    const right = chart.labels ? Math.min(width * 0.34, 14 + 6.9 * highest(labels.map((l) => l.length))) : 12;
    frame = { width, left, top, w: Math.max(40, width - left - right), h: height - top - 40 };
    root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    root.replaceChildren();
    drawAxes();
    for (const line of lines) if (line.y >= y.low && line.y <= y.high) drawAcross(line, narrow);
    drawSeries();
    for (const { x: mx, y: my, color } of marks)
      root.append(svg("circle", { class: "mark", cx: along(mx), cy: up(my), r: 4.5, style: `stroke:${color}` }));
    if (chart.labels) drawLabels(labels);
    root.append(cursorLine, dots);
    move(cursor);
  }

  function drawAxes() {
    const { left, top, w, h } = frame;
    for (const v of ticks(y.low, y.high, height > 200 ? 5 : 3))
      root.append(
        svg("line", { class: "grid", x1: left, x2: left + w, y1: up(v), y2: up(v) }),
        svg("text", { x: left - 8, y: up(v) + 4, "text-anchor": "end" }, y.tick(v)),
      );
    if (y.name) root.append(svg("text", { x: 0, y: 12 }, y.name));
    let last = -Infinity;
    for (const v of x.log ? logTicks(x.low, x.high) : ticks(x.low, x.high, clamp(w / 60, 3, 8))) {
      if (along(v) - last < 42) continue;
      last = along(v);
      root.append(svg("text", { x: last, y: top + h + 17, "text-anchor": "middle" }, x.tick(v)));
    }
    root.append(svg("text", { x: left + w / 2, y: height - 4, "text-anchor": "middle" }, x.name));
  }

  function drawAcross(line, narrow) {
    const { left, w } = frame;
    const level = up(line.y);
    root.append(
      svg("line", { class: "reference", x1: left, x2: left + w, y1: level, y2: level }),
      svg("text", { class: "label quiet", x: left + 4, y: level + 15 }, narrow ? (line.short ?? line.name) : line.name),
    );
  }

  function drawSeries() {
    const { left, top, w, h } = frame;
    const inside = svg("g", { "clip-path": `url(#${clip})` });
    root.append(svg("clipPath", { id: clip }, svg("rect", { x: left, y: top, width: w + 3, height: h + 2 })), inside);
    for (const { points, color } of series) {
      const banded = points.filter((p) => drawable(p) && p.high > p.low);
      if (banded.length < 2) continue;
      const there = banded.map((p) => `${along(p.x)},${up(p.high)}`);
      const andBack = banded.map((p) => `${along(p.x)},${up(p.low)}`).reverse();
      inside.append(svg("path", { class: "band", d: `M${[...there, ...andBack].join("L")}Z`, style: `fill:${color}` }));
    }
    for (const { points, color, dash } of series) {
      let path = "";
      let pen = "M";
      for (const p of points) {
        if (drawable(p)) path += `${pen}${along(p.x).toFixed(1)},${up(p.y).toFixed(1)}`;
        pen = drawable(p) ? "L" : "M";
      }
      const style = `stroke:${color};stroke-dasharray:${dash ?? "none"}`;
      if (path) inside.append(svg("path", { class: "line", d: path, style }));
      const real = points.filter(drawable);
      if (real.length === 1)
        inside.append(svg("circle", { cx: along(real[0].x), cy: up(real[0].y), r: 3.5, style: `fill:${color}` }));
    }
  }

  // A label at the end of every line, pushed apart where lines end together.
  function drawLabels(labels) {
    const ends = series
      .map((s, i) => ({ text: labels[i], color: s.color, point: s.points.filter(drawable).at(-1) }))
      .filter((end) => end.point)
      .map((end) => ({ ...end, x: along(end.point.x) + 8, y: up(clamp(end.point.y, y.low, y.high)) + 4 }))
      .sort((a, b) => a.y - b.y);
    for (let i = 1; i < ends.length; i++) ends[i].y = Math.max(ends[i].y, ends[i - 1].y + 15);
    for (let i = ends.length - 1, floor = frame.top + frame.h + 4; i >= 0; i--, floor -= 15)
      ends[i].y = Math.min(ends[i].y, floor);
    for (const end of ends)
      root.append(svg("text", { class: "label", x: end.x, y: end.y, style: `fill:${end.color}` }, end.text));
  }

  function move(value) {
    cursor = value;
    if (!frame) return;
    const shown = value ?? x.high;
    root.setAttribute("aria-valuemin", x.low);
    root.setAttribute("aria-valuemax", x.high);
    root.setAttribute("aria-valuenow", shown);
    root.setAttribute("aria-valuetext", chart.say(shown));
    cursorLine.setAttribute("visibility", value === null ? "hidden" : "visible");
    dots.replaceChildren();
    if (value === null) return;
    const px = along(value);
    for (const [key, v] of Object.entries({ x1: px, x2: px, y1: frame.top, y2: frame.top + frame.h }))
      cursorLine.setAttribute(key, v);
    for (const { points, color } of series) {
      const v = at(points, value, "y", x.log);
      if (v !== null && v <= y.high && v >= y.low)
        dots.append(svg("circle", { class: "dot", cx: px, cy: up(v), r: 4, style: `fill:${color}` }));
    }
  }

  function go(value) {
    move(value);
    chart.tell(value);
  }
  function follow(event) {
    const box = root.getBoundingClientRect();
    if (frame) go(back(((event.clientX - box.left) * frame.width) / box.width));
  }
  root.addEventListener("pointermove", follow);
  root.addEventListener("pointerdown", follow);
  root.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !chart.sticky) go(null);
  });
  root.addEventListener("keydown", (event) => {
    const here = cursor ?? x.high;
    const next = stops.find((stop) => stop > here * (1 + 1e-9)) ?? here;
    const previous = stops.findLast((stop) => stop < here * (1 - 1e-9)) ?? here;
    const targets = { ArrowRight: next, ArrowUp: next, ArrowLeft: previous, ArrowDown: previous };
    Object.assign(targets, { Home: stops[0], End: stops.at(-1) });
    if (event.key in targets) go(targets[event.key]);
    else if (event.key === "Escape" && !chart.sticky) go(null);
    else return;
    event.preventDefault();
  });
  new ResizeObserver(draw).observe(host);
  draw();
  return { move };
}

// Curves of held-out loss
// ----------------------------------------------------------------------------------------------------

function curves(host) {
  const teams = report.teams
    .map((team) => ({ ...team, curve: team.curve.filter((point) => known(point.loss)) }))
    .filter((team) => team.curve.length);
  if (!teams.length) return host.replaceWith(html("p", { class: "note" }, "No held-out loss was recorded."));
  if (teams.every(({ curve }) => curve.length < 2)) {
    const once = "The loss was evaluated once, which makes no curve; the table has it.";
    return host.replaceWith(html("p", { class: "note" }, once));
  }
  // From the lowest loss to the highest that any team has from a quarter of its training on.
  const high = highest(teams.flatMap(({ curve }) => curve.slice(Math.floor((curve.length - 1) / 4)).map((p) => p.loss)));
  const low = lowest(teams.flatMap(({ curve }) => curve.map((point) => point.low ?? point.loss)));
  const margin = 0.06 * (high - low || Math.abs(high) || 1);
  const digits = high - low < 0.3 ? 2 : 1;
  const y = { low: low - margin, high: high + margin, name: "nats per token", tick: (v) => v.toFixed(digits) };

  const longest = highest(teams.map(({ curve }) => curve.at(-1).seconds));
  const [second, unit] = longest >= 7200 ? [3600, "hours"] : longest >= 120 ? [60, "minutes"] : [1, "seconds"];
  const prefixed = (v) => si(v, { exact: true });
  const plain = (v) => String(Number(v.toPrecision(3)));
  const tokens = { key: "tokens", tab: "Tokens", name: "training tokens", unit: 1, tick: prefixed };
  const flops = { key: "flops", tab: "FLOPs", name: "training FLOPs", unit: 1, tick: prefixed };
  const time = { key: "seconds", tab: "Time", name: `training time in ${unit}`, unit: second, tick: plain };
  tokens.text = (v) => `${si(v)} tokens`;
  flops.text = (v) => `${si(v)}FLOP`;
  time.text = (v) => `${v.toFixed(v < 20 ? 1 : 0)} ${unit}`;
  for (const [axis, panel] of tabbed(host, [tokens, flops, time])) curvesAgainst(axis, y, teams, panel);
}

// Tabs and their panels, by pointer and arrow keys: [[axis, panel], ...].
function tabbed(host, axes) {
  const list = html("div", { role: "tablist", "aria-label": "Held-out loss against" });
  const panels = html("div", { class: "panels" });
  host.append(list, panels);
  const made = axes.map((axis) => {
    const [tabId, panelId] = [`tab-${axis.key}`, `panel-${axis.key}`];
    const tab = html("button", { type: "button", role: "tab", id: tabId, "aria-controls": panelId }, axis.tab);
    const panel = html("div", { role: "tabpanel", id: panelId, "aria-labelledby": tabId });
    list.append(tab);
    panels.append(panel);
    return { axis, tab, panel };
  });
  function choose(chosen) {
    made.forEach(({ tab, panel }, i) => {
      tab.setAttribute("aria-selected", i === chosen);
      tab.tabIndex = i === chosen ? 0 : -1;
      panel.classList.toggle("shown", i === chosen);
    });
  }
  made.forEach(({ tab }, i) => {
    tab.addEventListener("click", () => choose(i));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: made.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const chosen = (to + made.length) % made.length;
      choose(chosen);
      made[chosen].tab.focus();
    });
  });
  choose(0);
  return made.map(({ axis, panel }) => [axis, panel]);
}

function curvesAgainst(axis, y, teams, panel) {
  const series = teams
    .map((team) => ({
      label: team.label,
      short: team.label.split("·")[0].trim(), // "Team 2 · mixture of experts"
      color: team.color,
      dash: team.name === "dense-total" ? "7 4" : null,
      points: team.curve
        .filter((p) => known(p[axis.key]))
        .map((p) => ({ x: p[axis.key] / axis.unit, y: p.loss, low: p.low, high: p.high })),
    }))
    .filter((s) => s.points.length);
  if (!series.length) return panel.append(html("p", { class: "note" }, "Not recorded."));
  // Teams that end far apart would press the shorter curves against the left edge; a log scale keeps ratios readable.
  const ends = series.map((s) => s.points.at(-1).x);
  const seen = series.flatMap((s) => s.points.filter((p) => p.y <= y.high && p.x > 0).map((p) => p.x));
  const log = highest(ends) > 2.5 * lowest(ends) && lowest(seen) < highest(ends);
  const x = {
    log,
    low: log ? lowest(seen) * 0.8 : 0,
    high: highest(ends),
    name: log ? `${axis.name} (log scale)` : axis.name,
    tick: axis.tick,
  };
  const goal = known(report.goal) && report.goal <= y.high ? report.goal : null;
  const reached = teams.filter((team) => goal !== null && known(team.reached?.[axis.key]));

  const legend = html("ul", { class: "legend" });
  const plot = html("div");
  const where = html("p", { class: "readout" });
  panel.append(legend, plot, where);
  const value = (s, v, key) => (v === null ? s.points.at(-1)[key] : at(s.points, v, key, log));
  function tell(v) {
    where.textContent = v === null ? "Values above: at the end of training." : `Values above: after ${axis.text(v)}.`;
    legend.replaceChildren(
      ...series.map((s) => {
        const [low, high] = [value(s, v, "low"), value(s, v, "high")];
        const range = known(low) && high > low ? ` (${fixed(low, 3)}–${fixed(high, 3)})` : "";
        const loss = html("b", {}, fixed(value(s, v, "y"), 3));
        return html("li", {}, swatch(s.color), `${s.label} `, loss, html("span", { class: "range" }, range));
      }),
    );
  }
  tell(null);
  lineChart(plot, {
    name: `Held-out loss in nats per token against ${axis.name}`,
    series,
    x,
    y,
    height: 380,
    labels: series.length > 1,
    lines: goal === null ? [] : [{ y: goal, name: "the small dense model’s final loss", short: "small dense, final" }],
    marks: reached.map((team) => ({ x: team.reached[axis.key] / axis.unit, y: goal, color: team.color })),
    tell,
    say: (v) => `${axis.text(v)}: ${series.map((s) => `${s.label} ${fixed(value(s, v, "y"), 3)}`).join(", ")}`,
  });
}

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
  if (last) section.append(html("div", { class: "step" }, play, html("label", { for: sliderId }, "Step"), slider, when));
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
    timer = setInterval(() => {
      show(++at);
      if (at >= last) stop();
    }, clamp(10000 / last, 50, 500));
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
          ? svg("text", { x: left, y: top + l * block + 15 }, `layer ${layers[l]}, experts 0 to ${load[0][l].length - 1}`)
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
  function follow(event) {
    if (!grid) return;
    const box = root.getBoundingClientRect();
    const zoom = grid.width / box.width;
    const [px, py] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
    const l = clamp(Math.floor((py - grid.top) / grid.block), 0, layers.length - 1);
    const row = Math.max(0, Math.floor((py - grid.top - l * grid.block - grid.head) / grid.h));
    look(l, row * grid.columns + clamp(Math.floor((px - grid.left) / grid.w), 0, grid.columns - 1));
  }
  root.addEventListener("pointermove", follow);
  root.addEventListener("pointerdown", follow);
  root.addEventListener("keydown", (event) => {
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!by || !grid) return;
    event.preventDefault();
    if (focus) look(focus[0] + by[0], focus[1] + by[1]);
    else look(0, 0);
  });
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

// text coloured by expert
// ----------------------------------------------------------------------------------------------------

const HIGHLIGHTED = 6; // experts with a colour of their own; where there are hardly more, all have one

function expertColor(place) {
  const hue = ((place * 360) / (HIGHLIGHTED + 2) + 25).toFixed(0);
  return `light-dark(oklch(0.89 0.085 ${hue}), oklch(0.42 0.085 ${hue}))`;
}

function sample(host) {
  const { pieces, layers, experts, weights } = report.sample;
  // Per layer and token: [{expert, weight}], largest weight first; a token may have none.
  const choices = experts.map((tokens, l) =>
    tokens.map((ids, t) =>
      ids
        .map((expert, k) => ({ expert, weight: weights[l][t][k] ?? 0 }))
        .filter(({ expert }) => expert >= 0)
        .sort((a, b) => b.weight - a.weight),
    ),
  );
  const count = 1 + highest(experts.flat(2), 0);
  const colored = count <= HIGHLIGHTED + 2 ? count : HIGHLIGHTED;
  let layer = 0;
  let busiest = []; // the experts with a colour, of the layer that is shown
  let here = null;
  let picked = null;

  const select = html(
    "select",
    { id: "sample-layer" },
    ...layers.map((name, l) => html("option", { value: l }, `layer ${name}`)),
  );
  const clear = html("button", { type: "button", disabled: "" }, "Clear the marks");
  const legend = html("div", { class: "expert-legend", role: "group", "aria-label": "Experts that come first most often" });
  const readout = html("p", { class: "readout token-readout", role: "status" });
  const text = html("div", {
    class: "text",
    tabindex: 0,
    role: "application",
    "aria-label": "Held-out text; arrow keys move from token to token, Enter marks the tokens of its expert",
  });
  const spans = pieces.map((piece, t) => {
    const span = html("span", { "data-token": t }, piece);
    if (piece.includes("\n")) span.classList.add("newline");
    text.append(span);
    return span;
  });
  host.append(
    html("div", { class: "controls" }, html("label", { for: "sample-layer" }, "Experts of"), select, clear),
    legend,
    text,
    readout,
  );

  const first = (t) => choices[layer][t][0]?.expert ?? null;
  function recolor() {
    const tally = new Map();
    pieces.forEach((_, t) => first(t) !== null && tally.set(first(t), (tally.get(first(t)) ?? 0) + 1));
    busiest = [...tally].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, colored);
    const color = new Map(busiest.map(([expert], place) => [expert, expertColor(place)]));
    spans.forEach((span, t) => span.style.setProperty("--b", color.get(first(t)) ?? "var(--raised)"));
    legend.replaceChildren(
      ...busiest.map(([expert, n], place) => {
        const button = html("button", { type: "button", "data-expert": expert }, swatch(expertColor(place)), `expert ${expert} `, html("small", {}, `first for ${n}`));
        button.addEventListener("click", () => {
          picked = picked === expert ? null : expert;
          paint();
        });
        return button;
      }),
    );
    if (tally.size > busiest.length) legend.append(html("small", {}, `${tally.size - busiest.length} others in grey: point at a token`));
  }
  const quoted = (piece) => JSON.stringify(piece).slice(1, -1).replaceAll('\\"', '"');
  function paint() {
    spans.forEach((span, t) => {
      span.classList.toggle("same", picked !== null && first(t) === picked);
      span.classList.toggle("here", t === here);
    });
    text.classList.toggle("picked", picked !== null);
    for (const button of legend.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === picked));
    clear.disabled = picked === null;
    readout.replaceChildren(...describe());
  }
  function describe() {
    const out = [];
    if (here !== null) {
      const list = choices[layer][here].map(({ expert, weight }) => `expert ${expert} (${weight.toFixed(2)})`);
      out.push(
        html("code", {}, `“${quoted(pieces[here])}”`),
        ` at layer ${layers[layer]}: ${list.join(", ") || "no expert"}. `,
      );
    }
    if (picked !== null) {
      const same = pieces.filter((_, t) => first(t) === picked);
      const tally = new Map();
      same.forEach((piece) => tally.set(piece, (tally.get(piece) ?? 0) + 1));
      const top = [...tally]
        .sort((a, b) => b[1] - a[1])
        .slice(0, 6)
        .flatMap(([piece, n]) => [html("code", {}, `“${quoted(piece)}”`), n > 1 ? ` ×${n} ` : " "]);
      out.push(
        `Expert ${picked} comes first for ${same.length} of ${pieces.length} tokens${same.length ? ", most often " : ""}`,
        ...top,
      );
    }
    return out.length ? out : ["Point at a token, or use the arrow keys, to read its experts and their weights."];
  }
  const visit = (t) => {
    here = t;
    paint();
  };
  const pick = (t) => {
    here = t;
    picked = first(t) === picked ? null : first(t);
    paint();
  };
  const tokenOf = (event) => (event.target.dataset.token === undefined ? null : Number(event.target.dataset.token));

  text.addEventListener("pointerover", (event) => {
    const t = tokenOf(event);
    if (t !== null && event.pointerType === "mouse") visit(t);
  });
  text.addEventListener("click", (event) => {
    const t = tokenOf(event);
    if (t !== null) pick(t);
  });
  text.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (by !== undefined) {
      visit(clamp((here ?? 0) + (here === null ? 0 : by), 0, pieces.length - 1));
      spans[here].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" || event.key === " ") {
      if (here !== null) pick(here);
    } else if (event.key === "Escape") {
      picked = null;
      paint();
    } else return;
    event.preventDefault();
  });
  clear.addEventListener("click", () => {
    picked = null;
    paint();
  });
  select.addEventListener("change", () => {
    layer = Number(select.value);
    picked = null;
    recolor();
    paint();
  });
  recolor();
  paint();
}

// start
// ----------------------------------------------------------------------------------------------------

theme(document.getElementById("theme"));
curves(document.getElementById("curves"));
drawLesson(report);
report.teams.forEach((team, i) => team.routing && routing(team, i));
if (report.sample) sample(document.getElementById("sample"));
else document.getElementById("sample").remove();
