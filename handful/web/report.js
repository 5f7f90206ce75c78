// Draws what report.py put into the page as JSON: curves, load, text. No libraries, nothing is fetched.
// Colours are CSS variables, so that a change of theme needs no redrawing.

const report = JSON.parse(document.getElementById("data").textContent);

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
  const high = highest(
    teams.flatMap(({ curve }) => curve.slice(Math.floor((curve.length - 1) / 4)).map((p) => p.loss)),
  );
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
  const legend = html("div", {
    class: "expert-legend",
    role: "group",
    "aria-label": "Experts that come first most often",
  });
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
        const button = html(
          "button",
          { type: "button", "data-expert": expert },
          swatch(expertColor(place)),
          `expert ${expert} `,
          html("small", {}, `first for ${n}`),
        );
        button.addEventListener("click", () => {
          picked = picked === expert ? null : expert;
          paint();
        });
        return button;
      }),
    );
    if (tally.size > busiest.length)
      legend.append(html("small", {}, `${tally.size - busiest.length} others in grey: point at a token`));
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

// Draws what there is of it, and takes the sections away of what there is not.
function drawLesson(report) {
  const { lesson, sample, teams } = report;
  const section = (id, there, draw) => {
    const host = document.getElementById(id);
    if (there) draw(host);
    else host.remove();
  };
  section("prices", teams.length > 1, (host) => prices(host.querySelector(".trio"), teams) || host.remove());
  section("way", sample && lesson?.way.tokens.length, (host) => tokenWay(host, lesson.way, sample.pieces));
  section("apprentices", sample?.touched?.length && sample.pieces.length > 1, (host) => apprentices(host, sample));
  section("experts", lesson?.experts.layers.length, (host) => expertCards(host, lesson.experts));
  section("word", lesson?.word, (host) => twoContexts(host, lesson.word, lesson.way.layers));
  section("losses", lesson && sample, (host) => lossText(host, lesson.losses, sample.pieces, teams));
  section("go-on", lesson, (host) => goOn(host, lesson.continuations, teams));
  section("balances", report.balances?.length, (host) => balances(host, report.balances, teams));
}

theme(document.getElementById("theme"));
curves(document.getElementById("curves"));
drawLesson(report);
report.teams.forEach((team, i) => team.routing && routing(team, i));
if (report.sample) sample(document.getElementById("sample"));
else document.getElementById("sample").remove();
