// The teams side by side: on one text, token by token, in how they go on, in what their loss costs, and by balance.

// the teams on the same text, token by token
// ----------------------------------------------------------------------------------------------------

function lossText(host, losses, pieces, teams) {
  const named = teams.filter((team) => losses[team.name]);
  const mixture = named.find((team) => team.routing) ?? named.at(-1);
  const others = named.filter((team) => team !== mixture);
  const short = (team) => team.label.split("·").at(-1).trim(); // "Team 2 · mixture of experts"
  const views = [
    ...others.map((team) => ({ text: `${short(mixture)} beside ${short(team)}`, team: mixture, beside: team })),
    ...named.map((team) => ({ text: `loss of ${short(team)}`, team, beside: null })),
  ];
  const select = html("select", { id: "loss-view" }, ...views.map((view, i) => option(i, view.text)));
  const summary = html("p", { class: "how" });
  const readout = html("p", { class: "readout token-readout", role: "status" });
  host.append(html("div", { class: "controls" }, html("label", { for: "loss-view" }, "Show"), select), summary);
  const view = () => views[Number(select.value)];
  const value = (t) => {
    const { team, beside } = view();
    const mine = losses[team.name][t];
    return !known(mine) ? null : beside === null ? mine : losses[beside.name][t] - mine;
  };
  const color = (t) => {
    const v = value(t);
    if (v === null) return "none";
    const share = view().beside === null ? clamp(v / 8, 0, 1) : clamp(Math.abs(v) / 2, 0, 1);
    const hue = view().beside === null || v < 0 ? "--hot" : "--cold";
    return `color-mix(in oklab, var(${hue}) ${(42 * share).toFixed(0)}%, transparent)`;
  };
  const paint = readable(host, pieces, "The loss of every token; arrow keys move from token to token", color, (t) => {
    const each = named.map((team) => `${short(team)} ${fixed(losses[team.name][t], 2)}`);
    readout.replaceChildren(
      code(pieces[t]),
      known(losses[named[0].name][t])
        ? ` cost, in nats: ${each.join(", ")}.`
        : " begins a sequence: nothing was predicted.",
    );
  });
  host.append(readout);
  function show() {
    const { team, beside } = view();
    const values = pieces.map((_, t) => value(t)).filter(known);
    const mean = values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
    const better = values.filter((v) => v > 0).length;
    summary.textContent =
      beside === null
        ? `${short(team)}: ${fixed(mean, 3)} nats per token over these ${values.length} tokens. ` +
          "The stronger the colour, the less it expected the token."
        : `Blue: the ${short(team)} expected the token more; red: the ${short(beside)} did. ` +
          `Blue is ahead on ${better} of ${values.length} tokens; in the mean its loss is ` +
          `${Math.abs(mean).toFixed(3)} nats per token ${mean < 0 ? "higher" : "lower"}. ` +
          "These few tokens decide nothing: the table above is of the whole held-out text.";
    readout.textContent = "Point at a token, or use the arrow keys, to read what it cost each team.";
    paint();
  }
  select.addEventListener("change", show);
  show();
}

function goOn(host, { prompt, real, teams }, shown) {
  const list = html("dl", { class: "continuations" });
  const entry = (name, color, text) =>
    list.append(
      html("div", {}, html("dt", {}, color ? swatch(color) : "", name), html("dd", {}, html("pre", {}, text))),
    );
  for (const team of shown) if (team.name in teams) entry(team.label, team.color, teams[team.name]);
  entry("What really follows", null, real);
  host.append(html("pre", { class: "context" }, prompt), list);
}

// what the loss costs
// ----------------------------------------------------------------------------------------------------

function prices(host, teams) {
  const kinds = [
    ["Memory", "memory", "bytes of weights", (v) => `${si(v)}B`],
    ["Work", "flops", "training FLOPs per token", (v) => `${si(v)}FLOP`],
    ["Time", "seconds", "seconds of training", (v) => `${si(v)} s`],
  ];
  for (const [title, key, name, tick] of kinds) {
    const points = teams.filter((team) => known(team.price?.[key]) && known(team.price.loss));
    if (points.length < 2) continue;
    const box = html("div");
    const plot = html("div");
    box.append(html("h3", {}, `Loss against ${title.toLowerCase()}`), plot);
    host.append(box);
    scatter(
      plot,
      points.map((team) => ({ ...team.price, x: team.price[key], label: team.label, color: team.color })),
      name,
      tick,
    );
  }
  return host.children.length > 0;
}

function scatter(plot, points, name, tick) {
  const xs = points.map((p) => p.x);
  const log = lowest(xs) > 0 && highest(xs) > 4 * lowest(xs);
  const f = (v) => (log ? Math.log(v) : v);
  const [x0, x1] = [f(lowest(xs)), f(highest(xs))];
  const [y0, y1] = [lowest(points.map((p) => p.low)), highest(points.map((p) => p.high))];
  const tall = 210;
  const said = points.map((p) => `${p.label}: ${fixed(p.loss, 3)} at ${tick(p.x)}`).join("; ");
  const root = svg("svg", { class: "scatter", role: "img", "aria-label": `Held-out loss against ${name}. ${said}` });
  plot.append(root);
  function draw() {
    const width = plot.clientWidth;
    if (!width) return;
    const [left, right, top, bottom] = [44, 14, 32, 46];
    const along = (v) => left + 14 + (width - left - right - 28) * (x1 > x0 ? (f(v) - x0) / (x1 - x0) : 0.5);
    const up = (v) => top + 8 + (tall - top - bottom - 16) * (y1 > y0 ? (y1 - v) / (y1 - y0) : 0.5);
    root.setAttribute("viewBox", `0 0 ${width} ${tall}`);
    root.replaceChildren(svg("text", { x: 0, y: 12 }, "nats per token"));
    for (const v of ticks(y0, y1, 3))
      root.append(
        svg("line", { class: "grid", x1: left, x2: width - right, y1: up(v), y2: up(v) }),
        svg("text", { x: left - 8, y: up(v) + 4, "text-anchor": "end" }, v.toFixed(2)),
      );
    for (const v of [lowest(xs), highest(xs)])
      root.append(
        svg("text", { x: along(v), y: tall - 24, "text-anchor": v === lowest(xs) ? "start" : "end" }, tick(v)),
      );
    root.append(
      svg(
        "text",
        { x: (left + width - right) / 2, y: tall - 6, "text-anchor": "middle" },
        log ? `${name} (log scale)` : name,
      ),
    );
    for (const p of points) {
      const [px, py] = [along(p.x), up(p.loss)];
      if (p.high > p.low)
        root.append(
          svg("line", { class: "error", x1: px, x2: px, y1: up(p.low), y2: up(p.high), style: `stroke:${p.color}` }),
        );
      const end = px > width * 0.6;
      root.append(
        svg("circle", { class: "dot", cx: px, cy: py, r: 6, style: `fill:${p.color}` }),
        svg(
          "text",
          {
            class: "label",
            x: px + (end ? -11 : 11),
            y: py + 4,
            "text-anchor": end ? "end" : "start",
            style: `fill:${p.color}`,
          },
          p.label.split("·").at(-1).trim(),
        ),
      );
    }
  }
  new ResizeObserver(draw).observe(plot);
  draw();
}

// with and without balance
// ----------------------------------------------------------------------------------------------------

function balances(host, pairs, teams) {
  for (const pair of pairs) {
    const row = html("div", { class: "balance-pair" });
    for (const i of pair) {
      const team = teams[i];
      const { load, layers } = team.routing;
      const late = load.slice(-Math.max(1, Math.round(load.length / 5)));
      const box = html(
        "div",
        {},
        html("h3", {}, swatch(team.color), team.label),
        html("p", { class: "note" }, `balance ${team.balance}; loss ${fixed(team.price.loss, 3)}`),
      );
      layers.forEach((layer, l) => {
        const mean = late[0][l].map((_, e) => late.reduce((sum, step) => sum + step[l][e], 0) / late.length);
        box.append(loadProfile(mean, layer));
      });
      row.append(box);
    }
    host.append(row);
  }
}

// The experts of a layer from the busiest to the idlest; the line is the even load.
function loadProfile(load, layer) {
  const ratios = load.map((share) => share * load.length).sort((a, b) => b - a);
  const most = Math.max(2, ratios[0]);
  const idle = ratios.filter((ratio) => ratio < DEAD).length;
  const text = `layer ${layer}: busiest ${ratios[0].toFixed(1)}× even, ${idle} of ${load.length} dead`;
  const root = svg("svg", {
    class: "profile",
    viewBox: `0 0 ${load.length * 10} 60`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": text,
  });
  ratios.forEach((ratio, i) => {
    const h = (58 * ratio) / most;
    root.append(
      svg("rect", {
        x: i * 10 + 0.5,
        y: 60 - h,
        width: 9,
        height: h,
        style: `fill:${heatColor(Math.max(ratio, 1e-3))}`,
      }),
    );
  });
  const even = 60 - 58 / most;
  root.append(
    svg("line", {
      class: "even-line",
      x1: 0,
      x2: load.length * 10,
      y1: even,
      y2: even,
      "vector-effect": "non-scaling-stroke",
    }),
  );
  return html("figure", {}, root, html("figcaption", {}, text));
}
