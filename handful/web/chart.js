// Numbers as people read them, axes, and the line chart: what the parts of a comparison's page draw with.

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
