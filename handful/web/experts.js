// The experts: how many a text touches, one by one on cards, and those of one word in two contexts.

// dozens of apprentices
// ----------------------------------------------------------------------------------------------------

function apprentices(host, { layers, touched, most, each }) {
  const last = touched[0].length;
  const mean = (t) => touched.reduce((sum, layer) => sum + layer[t - 1], 0) / layers.length;
  const marks = [1, 10, 100, last].filter((t, i, all) => t <= last && all.indexOf(t) === i);
  const said = marks.map((t) => `${t} token${t > 1 ? "s" : ""}: ${Number(mean(t).toFixed(0))}`);
  host.append(
    html(
      "p",
      { class: "how" },
      `Different experts touched, of ${most} in a layer, mean of the layers. `,
      html("b", {}, said.join(" · ")),
      ".",
    ),
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
  series.push({
    label: "at random",
    short: "random",
    color: "var(--muted)",
    dash: "2 4",
    points: xs.map((x) => ({ x, y: chance(x) })),
  });
  const reading = (v) => {
    const t = clamp(Math.round(v), 1, last);
    const here = layers.map((layer, l) => `layer ${layer} ${touched[l][t - 1]}`).join(", ");
    return `After ${t} token${t > 1 ? "s" : ""}: ${here}; experts drawn at random would be ${chance(t).toFixed(0)}.`;
  };
  const tell = (v) =>
    (readout.textContent =
      v === null
        ? `One token goes to ${Number(each.toFixed(1))} of ${most} in a layer, ${last} tokens to ` +
          `${Math.round(mean(last))}: memory must hold them all.`
        : reading(v));
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
    html(
      "p",
      { class: "how" },
      `${costly} Loads and tokens: from ${experts.tokens.toLocaleString("en")} held-out tokens; costs: from ` +
        `${experts.off_tokens.toLocaleString("en")} of them in ${experts.off_windows} windows. ` +
        "One expert that may go for nothing does not mean that all may.",
    ),
  );
  const select = html(
    "select",
    { id: "card-layer" },
    ...experts.layers.map(({ layer }, i) => option(i, `layer ${layer}`)),
  );
  const order = html(
    "select",
    { id: "card-order" },
    option("load", "busiest first"),
    option("cost", "costliest first"),
    option("expert", "by number"),
  );
  const grid = html("div", { class: "cards" });
  const more = html("button", { type: "button", class: "more" });
  let everyone = false;
  host.append(
    html(
      "div",
      { class: "controls" },
      html("label", { for: "card-layer" }, "Experts of"),
      select,
      html("label", { for: "card-order" }, "shown"),
      order,
    ),
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
  const card_ = html("article", {
    class: "card",
    tabindex: -1,
    "data-expert": card.expert,
    "aria-label": `Expert ${card.expert} of layer ${layer}`,
  });
  const load = html("span", { class: "load", style: `--w:${clamp(25 * ratio, 0, 100)}%` });
  const facts = html("dl");
  const fact = (name, ...what) => facts.append(html("dt", {}, name), html("dd", {}, ...what));
  fact("load", `${percent(card.load, 1)}, ${fixed(ratio, 2)}× even`);
  fact(
    "tokens",
    ...(card.tokens.length
      ? card.tokens.flatMap(([piece, n, of]) => [code(piece), html("small", {}, ` ${n}/${of} `)])
      : ["none"]),
  );
  if (card.partners.length)
    fact(
      "partners",
      ...card.partners.map(([other, share, base]) => {
        const button = html(
          "button",
          {
            type: "button",
            class: "partner",
            title: `expert ${other}: ${percent(share)} of these tokens, ${percent(base)} of all`,
            "aria-label": `expert ${other}, with ${percent(share)} of these tokens`,
          },
          `${other}`,
          html("small", {}, ` ${percent(share)}`),
        );
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
  const looked =
    word.word.trim() === word.asked
      ? []
      : [
          `“${word.asked}” does not stand twice in the text that was read, so the word is the most frequent one with ` +
            "two clearly different routings: ",
          name(),
          ". ",
        ];
  const far =
    word.shared > word.of / 2 ? " No word here is routed clearly differently: this is the nearest to it." : "";
  host.append(
    html(
      "p",
      { class: "how" },
      ...looked,
      "Below, two of its occurrences, picked for being far apart: they share ",
      html("b", {}, `${word.shared} of ${word.of}`),
      ` choices. Over all pairs of ${word.count} occurrences two share ${fixed(word.mean, 1)}, and any two tokens of ` +
        `the text ${fixed(word.any, 1)}. ` +
        (word.mean > 2 * word.any
          ? "So the word itself decides much of the routing, and what stands before it the rest."
          : "So the word itself decides little of the routing.") +
        far,
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
        ...list.map((e) =>
          html(
            "b",
            { class: other[l].includes(e) ? "chip same" : "chip" },
            String(e),
            other[l].includes(e) ? html("span", { class: "unseen" }, " shared") : "",
          ),
        ),
      ),
    );
    pair.append(
      html(
        "div",
        {},
        html("pre", { class: "context" }, before, html("mark", {}, word.word), html("span", { class: "after" }, after)),
        html("ul", { class: "chosen-of" }, ...rows),
      ),
    );
  });
  host.append(
    pair,
    html(
      "p",
      { class: "note" },
      "Numbers are experts; filled ones are chosen in both places. Words that come after, in grey, no router has seen.",
    ),
  );
}
