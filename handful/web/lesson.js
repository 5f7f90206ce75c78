// What a mixture did with one text: the way of a token, experts touched, cards, a word in two contexts, losses, and how
// each team goes on. And what the whole comparison costs. It stands before report.js, which calls it.

const option = (value, text) => html("option", { value }, text);
const percent = (share, digits = 0) => (known(share) ? `${(100 * share).toFixed(digits)} %` : "—");
const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
// On one line: "\n" and "\t" spelt, and many spaces counted.
const spelt = (piece) =>
  JSON.stringify(piece)
    .slice(1, -1)
    .replaceAll('\\"', '"')
    .replaceAll("\\\\", "\\")
    .replace(/ {4,}/g, (spaces) => `␣×${spaces.length}`) || "⋯"; // a part of a character: the rest stands further on
const code = (piece) => html("code", { class: "piece" }, spelt(piece));
const term = (name, text = name) => html("a", { class: "term", href: `#term-${name.replaceAll(" ", "-")}` }, text);

// A text that is read token by token: by pointer, touch, and arrow keys. color(t) is a CSS colour, tell(t) hears.
function readable(host, pieces, label, color, tell) {
  const text = html("div", { class: "text", tabindex: 0, role: "application", "aria-label": label });
  let here = null;
  const spans = pieces.map((piece, t) => {
    const span = html("span", { "data-token": t }, piece);
    if (piece.includes("\n")) span.classList.add("newline");
    text.append(span);
    return span;
  });
  function visit(t) {
    if (here !== null) spans[here].classList.remove("here");
    here = t;
    spans[t].classList.add("here");
    tell(t);
  }
  const tokenOf = (event) => (event.target.dataset.token === undefined ? null : Number(event.target.dataset.token));
  for (const kind of ["pointerover", "click"])
    text.addEventListener(kind, (event) => {
      if (tokenOf(event) !== null) visit(tokenOf(event));
    });
  text.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    visit(clamp((here ?? 0) + (here === null ? 0 : by), 0, pieces.length - 1));
    spans[here].scrollIntoView({ block: "nearest" });
  });
  host.append(text);
  const paint = () => spans.forEach((span, t) => span.style.setProperty("--b", color(t)));
  paint();
  return paint;
}

// the way of one token
// ----------------------------------------------------------------------------------------------------

const STAGES = ["token", "scores", "chosen", "parts", "blend"];

function tokenWay(host, { layers, tokens }, pieces) {
  const last = 4 * layers.length + 1; // the token, four stages a layer, what follows
  const letters = ({ at: place }) => pieces[place].replace(/[^\p{L}]/gu, "").length;
  let which = tokens.reduce((best, token, i) => (letters(token) > letters(tokens[best]) ? i : best), 0);
  let step = 0;

  const choices = html("div", { class: "way-tokens", role: "group", "aria-label": "The token to follow" });
  const buttons = tokens.map(({ at: place }, i) => {
    const button = html("button", { type: "button", "data-way": i }, spelt(pieces[place]));
    button.addEventListener("click", () => go(i, step));
    choices.append(button);
    return button;
  });
  const before = html("code", { class: "way-before" });
  const back = html("button", { type: "button", class: "way-back" }, "← Back");
  const next = html("button", { type: "button", class: "way-next" }, "Next →");
  const place = html("output", { class: "way-place" });
  const bar = html("input", { type: "range", min: 0, max: last, "aria-label": "Step of the way" });
  const says = html("p", { class: "way-says", role: "status" });
  const stage = html("div", {
    class: "way-stage",
    tabindex: 0,
    role: "group",
    "aria-label": "One step of the way; the left and right arrow keys go back and on",
  });
  host.append(
    html("p", { class: "way-context" }, before, choices),
    html("div", { class: "way-controls" }, back, next, bar, place),
    says,
    stage,
  );

  // Which layer and stage a step is; layer null: the token itself, or what follows.
  const where = (s) =>
    s === 0 ? [null, "token"] : s === last ? [null, "next"] : [Math.floor((s - 1) / 4), STAGES[1 + ((s - 1) % 4)]];

  function go(i, s) {
    which = i;
    step = clamp(s, 0, last);
    const [layer, kind] = where(step);
    const token = tokens[which];
    buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === which)));
    before.textContent = spelt(pieces.slice(Math.max(0, tokens[0].at - 12), tokens[0].at).join(""));
    back.disabled = step === 0;
    next.disabled = step === last;
    bar.value = step;
    const name = layer === null ? kind : `layer ${layers[layer]}, ${kind}`;
    place.textContent = `step ${step + 1} of ${last + 1}`;
    bar.setAttribute("aria-valuetext", `${place.textContent}: ${name}`);
    says.replaceChildren(...sentence(token, layer, kind));
    stage.replaceChildren();
    if (kind === "next") following(stage, token.next);
    else if (kind === "token") theToken(stage, token);
    else atLayer(stage, token.layers[layer], STAGES.indexOf(kind));
  }

  function sentence(token, layer, kind) {
    const piece = code(pieces[token.at]);
    if (kind === "token")
      return ["The ", term("token"), " ", piece, " becomes a row of numbers. It has read what stands before it."];
    if (kind === "next") return ["After the last layer the row becomes a probability for every token that may follow."];
    const at = token.layers[layer];
    const best = at.experts.map((e) => `expert ${e}`).join(" and ") || "no expert";
    const lead = html("b", {}, `Layer ${layers[layer]}. `);
    return {
      scores: [lead, "The ", term("router"), ` gives each of the ${at.scores.length} experts a `, term("score"), " for ", piece, "."],
      chosen: [lead, `Only ${best} will work; the other ${at.scores.length - at.experts.length} rest, and cost no computation.`],
      parts: [lead, "Each chosen expert computes a row of numbers, which is multiplied by its ", term("weight"), "."],
      blend: [
        lead,
        "The sum is the ", term("blend"), ". It is added to the token’s row, ",
        layer + 1 < layers.length ? "and the next layer goes on from there." : "and that was the last layer.",
      ],
    }[kind];
  }

  // The token, and its whole way at a glance.
  function theToken(box, token) {
    const ways = token.layers.map(({ experts, weights }, l) =>
      html(
        "li",
        {},
        html("span", {}, `layer ${layers[l]}`),
        ...experts.map((e, k) => html("b", { class: "chip" }, `expert ${e}`, html("small", {}, ` ${fixed(weights[k], 2)}`))),
      ),
    );
    const size = token.layers[0]?.sizes.before;
    box.append(
      html("p", { class: "way-token" }, code(pieces[token.at])),
      html("p", { class: "note" }, known(size) ? `On arriving at the first experts its row has length ${size}. Its way, with the weights:` : ""),
      html("ul", { class: "chosen-of" }, ...ways),
    );
  }

  function atLayer(box, at, depth) {
    scoreBars(box, at, depth >= 2);
    if (depth >= 3) contributions(box, at, depth >= 4);
  }

  function following(box, list) {
    const most = highest(list.map(([, p]) => p), 1e-9);
    box.append(
      html(
        "ol",
        { class: "way-next-tokens" },
        ...list.map(([piece, p]) =>
          html("li", {}, code(piece), html("i", { class: "bar", style: `--w:${(100 * p) / most}%` }), percent(p, 1)),
        ),
      ),
    );
  }

  back.addEventListener("click", () => go(which, step - 1));
  next.addEventListener("click", () => go(which, step + 1));
  bar.addEventListener("input", () => go(which, Number(bar.value)));
  stage.addEventListener("keydown", (event) => {
    if (event.target !== stage) return;
    const to = { ArrowRight: step + 1, ArrowLeft: step - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go(which, to);
  });
  go(which, 0);
}

// A bar for every expert's score; the chosen ones stand out once they are chosen.
function scoreBars(box, { scores, experts }, choose) {
  const chosen = new Set(choose ? experts : []);
  const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a]);
  const readout = html("p", { class: "readout" });
  const tall = 110;
  const most = highest(scores, 1e-9);
  const root = svg("svg", {
    class: "plot scores",
    viewBox: `0 0 ${scores.length * 10} ${tall + 2}`,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `Scores of ${scores.length} experts; highest: ${order.slice(0, 3).map((e) => `expert ${e} ${scores[e]}`).join(", ")}`,
  });
  scores.forEach((score, e) => {
    const h = Math.max(1, (tall * score) / most);
    const kind = chosen.has(e) ? "score chosen" : choose ? "score rests" : "score";
    root.append(svg("rect", { class: kind, x: e * 10 + 1, y: tall + 1 - h, width: 8, height: h }));
  });
  const plain = experts.length
    ? `Highest: ${order.slice(0, 4).map((e) => `expert ${e} (${scores[e]})`).join(", ")}.`
    : "No expert took this token.";
  readout.textContent = plain;
  const follow = (event) => {
    const box = root.getBoundingClientRect();
    const e = clamp(Math.floor(((event.clientX - box.left) / box.width) * scores.length), 0, scores.length - 1);
    readout.textContent = `Expert ${e}: score ${scores[e]}, place ${order.indexOf(e) + 1} of ${scores.length}.`;
  };
  root.addEventListener("pointermove", follow);
  root.addEventListener("pointerdown", follow);
  root.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") readout.textContent = plain;
  });
  box.append(root, html("p", { class: "axis-note" }, html("span", {}, "expert 0"), html("span", {}, `expert ${scores.length - 1}`)), readout);
}

function contributions(box, at, blended) {
  const row = (values) => values.map((v) => html("td", {}, fixed(v, 2)));
  const body = html("tbody");
  at.experts.forEach((e, k) =>
    body.append(
      html(
        "tr",
        {},
        html("th", { scope: "row" }, `expert ${e}`),
        html("td", { class: "times" }, `${fixed(at.weights[k], 3)} ×`),
        ...row(at.outputs[k]),
        html("td", { class: "share" }, html("i", { class: "bar", style: `--w:${clamp(100 * at.shares[k], 0, 100)}%` }), percent(at.shares[k])),
      ),
    ),
  );
  if (at.shares.length > at.experts.length) {
    const share = at.shares.at(-1);
    const bar = html("i", { class: "bar", style: `--w:${clamp(100 * share, 0, 100)}%` });
    const blank = at.blend.map(() => html("td", {}, ""));
    body.append(html("tr", {}, html("th", { scope: "row" }, "shared"), html("td", {}, ""), ...blank, html("td", { class: "share" }, bar, percent(share))));
  }
  if (blended)
    body.append(
      html("tr", { class: "sum" }, html("th", { scope: "row" }, "blend"), html("td", { class: "times" }, "="), ...row(at.blend), html("td", {}, "")),
    );
  const heads = ["", "weight", ...at.blend.map((_, i) => String(i + 1)), "part of the blend"];
  const head = html("thead", {}, html("tr", {}, ...heads.map((name) => html("th", { scope: "col" }, name))));
  const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": "What each chosen expert gives" };
  box.append(html("div", region, html("table", { class: "parts" }, html("caption", {}, `The first ${at.blend.length} numbers of each row`), head, body)));
  if (blended) {
    const { before, after, blend } = at.sizes;
    box.append(html("p", { class: "note" }, `The blend has length ${blend}; the token’s row goes from ${before} to ${after}.`));
  }
}

// dozens of apprentices
// ----------------------------------------------------------------------------------------------------

function apprentices(host, { layers, touched, most, each }) {
  const last = touched[0].length;
  const mean = (t) => touched.reduce((sum, layer) => sum + layer[t - 1], 0) / layers.length;
  const marks = [1, 10, 100, last].filter((t, i, all) => t <= last && all.indexOf(t) === i);
  const said = marks.map((t) => `${t} token${t > 1 ? "s" : ""}: ${Number(mean(t).toFixed(0))}`);
  host.append(
    html("p", { class: "how" }, `Different experts touched, of ${most} in a layer, mean of the layers. `, html("b", {}, said.join(" · ")), "."),
  );
  const plot = html("div");
  const readout = html("p", { class: "readout" });
  host.append(plot, readout);
  const chance = (t) => most * (1 - (1 - each / most) ** t);
  const xs = Array.from({ length: last }, (_, i) => i + 1);
  const series = layers.map((layer, l) => ({
    label: `layer ${layer}`,
    short: String(layer),
    color: layerColor(l, layers.length),
    points: xs.map((x) => ({ x, y: touched[l][x - 1] })),
  }));
  series.push({ label: "at random", short: "random", color: "var(--muted)", dash: "2 4", points: xs.map((x) => ({ x, y: chance(x) })) });
  const reading = (v) => {
    const t = clamp(Math.round(v), 1, last);
    const here = layers.map((layer, l) => `layer ${layer} ${touched[l][t - 1]}`).join(", ");
    return `After ${t} token${t > 1 ? "s" : ""}: ${here}; experts drawn at random would be ${chance(t).toFixed(0)}.`;
  };
  const tell = (v) => (readout.textContent = v === null ? `One token goes to ${Number(each.toFixed(1))} of ${most} in a layer, ${last} tokens to ${Math.round(mean(last))}: memory must hold them all.` : reading(v));
  tell(null);
  lineChart(plot, {
    name: "Different experts touched against tokens read",
    series,
    x: { log: last > 1, low: 1, high: last, name: "tokens read (log scale)", tick: (v) => String(v) },
    y: { low: 0, high: most * 1.03, name: "experts touched", tick: (v) => String(v) },
    height: 280,
    labels: layers.length <= 8,
    lines: [{ y: most, name: `all ${most}` }],
    tell,
    say: reading,
  });
}

// cards of experts
// ----------------------------------------------------------------------------------------------------

const FIRST_CARDS = 8;

function expertCards(host, experts) {
  const all = experts.layers.flatMap(({ layer, cards }) => cards.map((card, expert) => ({ ...card, layer, expert })));
  const beyond = all.filter((card) => card.beyond);
  const worst = all.filter((card) => known(card.cost)).sort((a, b) => b.cost - a.cost)[0];
  const off = "Switched off one at a time, so that its tokens take the next best,";
  const costliest = () =>
    ` The costliest is expert ${worst.expert} of layer ${worst.layer}: ${signed(worst.cost, 3)} nats per token` +
    (known(worst.error) ? ` (± ${worst.error.toFixed(3)}, one standard error).` : ".");
  const costly = !worst
    ? ""
    : beyond.length
      ? `${off} ${beyond.length} of ${all.length} experts change the loss by more than noise.${costliest()}`
      : `${off} none of ${all.length} experts changes the loss by more than noise.`;
  host.append(
    html("p", { class: "how" }, `${costly} Loads and tokens: from ${experts.tokens.toLocaleString("en")} held-out tokens; costs: from ` +
      `${experts.off_tokens.toLocaleString("en")} of them in ${experts.off_windows} windows. One expert that may go for nothing does not mean that all may.`),
  );
  const select = html("select", { id: "card-layer" }, ...experts.layers.map(({ layer }, i) => option(i, `layer ${layer}`)));
  const order = html("select", { id: "card-order" }, option("load", "busiest first"), option("cost", "costliest first"), option("expert", "by number"));
  const grid = html("div", { class: "cards" });
  const more = html("button", { type: "button", class: "more" });
  let everyone = false;
  host.append(
    html("div", { class: "controls" }, html("label", { for: "card-layer" }, "Experts of"), select, html("label", { for: "card-order" }, "shown"), order),
    grid,
    more,
  );
  function show(focus = null) {
    const { layer, cards } = experts.layers[Number(select.value)];
    const list = cards.map((card, expert) => ({ ...card, expert }));
    if (order.value !== "expert") list.sort((a, b) => (b[order.value] ?? -Infinity) - (a[order.value] ?? -Infinity));
    const shown = everyone ? list : list.slice(0, FIRST_CARDS);
    grid.replaceChildren(...shown.map((card) => expertCard(card, layer, cards.length, meet)));
    more.hidden = list.length <= FIRST_CARDS;
    more.textContent = everyone ? `Show ${FIRST_CARDS} only` : `Show all ${list.length}`;
    if (focus !== null) grid.querySelector(`[data-expert="${focus}"]`)?.focus();
  }
  const meet = (expert) => {
    everyone = true;
    show(expert);
  };
  select.addEventListener("change", () => show());
  order.addEventListener("change", () => show());
  more.addEventListener("click", () => {
    everyone = !everyone;
    show();
  });
  show();
}

function expertCard(card, layer, experts, meet) {
  const ratio = card.load * experts;
  const card_ = html("article", { class: "card", tabindex: -1, "data-expert": card.expert, "aria-label": `Expert ${card.expert} of layer ${layer}` });
  const load = html("span", { class: "load", style: `--w:${clamp(25 * ratio, 0, 100)}%` });
  const facts = html("dl");
  const fact = (name, ...what) => facts.append(html("dt", {}, name), html("dd", {}, ...what));
  fact("load", `${percent(card.load, 1)}, ${fixed(ratio, 2)}× even`);
  fact("tokens", ...(card.tokens.length ? card.tokens.flatMap(([piece, n, of]) => [code(piece), html("small", {}, ` ${n}/${of} `)]) : ["none"]));
  if (card.partners.length)
    fact(
      "partners",
      ...card.partners.map(([other, share, base]) => {
        const button = html("button", { type: "button", class: "partner", title: `expert ${other}: ${percent(share)} of these tokens, ${percent(base)} of all`, "aria-label": `expert ${other}, with ${percent(share)} of these tokens` }, `${other}`, html("small", {}, ` ${percent(share)}`));
        button.addEventListener("click", () => meet(other));
        return button;
      }),
    );
  if (known(card.cost))
    fact(
      "without",
      html("b", {}, signed(card.cost, 4)),
      known(card.error) ? ` ± ${card.error.toFixed(4)} nats` : " nats",
      card.beyond ? "" : html("small", {}, " within noise"),
    );
  card_.append(html("h3", {}, `Expert ${card.expert}`), load, facts);
  return card_;
}

// one word, two contexts
// ----------------------------------------------------------------------------------------------------

function twoContexts(host, word, layers) {
  const name = () => code(word.word);
  const looked = word.word.trim() === word.asked
    ? []
    : [`“${word.asked}” does not stand twice in the text that was read, so the word is the most frequent one with two clearly different routings: `, name(), ". "];
  const far = word.shared > word.of / 2 ? " No word here is routed clearly differently: this is the nearest to it." : "";
  host.append(
    html(
      "p",
      { class: "how" },
      ...looked,
      "Below, two of its occurrences, picked for being far apart: they share ",
      html("b", {}, `${word.shared} of ${word.of}`),
      ` choices. Over all pairs of ${word.count} occurrences two share ${fixed(word.mean, 1)}, and any two tokens of the text ${fixed(word.any, 1)}. ` +
        "So the word itself decides much of the routing, and what stands before it decides some." + far,
    ),
  );
  const pair = html("div", { class: "contexts" });
  word.places.forEach(({ before, after, experts }, i) => {
    const other = word.places[1 - i].experts;
    const rows = experts.map((list, l) =>
      html(
        "li",
        {},
        html("span", {}, `layer ${layers[l]}`),
        ...list.map((e) => html("b", { class: other[l].includes(e) ? "chip same" : "chip" }, String(e), other[l].includes(e) ? html("span", { class: "unseen" }, " shared") : "")),
      ),
    );
    pair.append(
      html("div", {}, html("pre", { class: "context" }, before, html("mark", {}, word.word), html("span", { class: "after" }, after)), html("ul", { class: "chosen-of" }, ...rows)),
    );
  });
  host.append(pair, html("p", { class: "note" }, "Numbers are experts; filled ones are chosen in both places. Words that come after, in grey, no router has seen."));
}

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
    readout.replaceChildren(code(pieces[t]), known(losses[named[0].name][t]) ? ` cost, in nats: ${each.join(", ")}.` : " begins a sequence: nothing was predicted.");
  });
  host.append(readout);
  function show() {
    const { team, beside } = view();
    const values = pieces.map((_, t) => value(t)).filter(known);
    const mean = values.reduce((a, b) => a + b, 0) / Math.max(1, values.length);
    const better = values.filter((v) => v > 0).length;
    summary.textContent = beside === null
      ? `${short(team)}: ${fixed(mean, 3)} nats per token over these ${values.length} tokens. The stronger the colour, the less it expected the token.`
      : `Blue: the ${short(team)} expected the token more; red: the ${short(beside)} did. Blue is ahead on ${better} of ${values.length} tokens; in the mean its loss is ${Math.abs(mean).toFixed(3)} nats per token ${mean < 0 ? "higher" : "lower"}. These few tokens decide nothing: the table above is of the whole held-out text.`;
    readout.textContent = "Point at a token, or use the arrow keys, to read what it cost each team.";
    paint();
  }
  select.addEventListener("change", show);
  show();
}

function goOn(host, { prompt, real, teams }, shown) {
  const list = html("dl", { class: "continuations" });
  const entry = (name, color, text) =>
    list.append(html("div", {}, html("dt", {}, color ? swatch(color) : "", name), html("dd", {}, html("pre", {}, text))));
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
    scatter(plot, points.map((team) => ({ ...team.price, x: team.price[key], label: team.label, color: team.color })), name, tick);
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
      root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: up(v), y2: up(v) }), svg("text", { x: left - 8, y: up(v) + 4, "text-anchor": "end" }, v.toFixed(2)));
    for (const v of [lowest(xs), highest(xs)])
      root.append(svg("text", { x: along(v), y: tall - 24, "text-anchor": v === lowest(xs) ? "start" : "end" }, tick(v)));
    root.append(svg("text", { x: (left + width - right) / 2, y: tall - 6, "text-anchor": "middle" }, log ? `${name} (log scale)` : name));
    for (const p of points) {
      const [px, py] = [along(p.x), up(p.loss)];
      if (p.high > p.low) root.append(svg("line", { class: "error", x1: px, x2: px, y1: up(p.low), y2: up(p.high), style: `stroke:${p.color}` }));
      const end = px > width * 0.6;
      root.append(
        svg("circle", { class: "dot", cx: px, cy: py, r: 6, style: `fill:${p.color}` }),
        svg("text", { class: "label", x: px + (end ? -11 : 11), y: py + 4, "text-anchor": end ? "end" : "start", style: `fill:${p.color}` }, p.label.split("·").at(-1).trim()),
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
      const box = html("div", {}, html("h3", {}, swatch(team.color), team.label), html("p", { class: "note" }, `balance ${team.balance}; loss ${fixed(team.price.loss, 3)}`));
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
  const root = svg("svg", { class: "profile", viewBox: `0 0 ${load.length * 10} 60`, preserveAspectRatio: "none", role: "img", "aria-label": text });
  ratios.forEach((ratio, i) => {
    const h = (58 * ratio) / most;
    root.append(svg("rect", { x: i * 10 + 0.5, y: 60 - h, width: 9, height: h, style: `fill:${heatColor(Math.max(ratio, 1e-3))}` }));
  });
  const even = 60 - 58 / most;
  root.append(svg("line", { class: "even-line", x1: 0, x2: load.length * 10, y1: even, y2: even, "vector-effect": "non-scaling-stroke" }));
  return html("figure", {}, root, html("figcaption", {}, text));
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
