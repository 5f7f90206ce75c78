// The way of one token through the trained mixture, step by step; and what the lesson's parts share.

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
      scores: [
        lead,
        "The ",
        term("router"),
        ` gives each of the ${at.scores.length} experts a `,
        term("score"),
        " for ",
        piece,
        ".",
      ],
      chosen: [
        lead,
        `Only ${best} will work; the other ${at.scores.length - at.experts.length} rest, and cost no computation.`,
      ],
      parts: [lead, "Each chosen expert computes a row of numbers, which is multiplied by its ", term("weight"), "."],
      blend: [
        lead,
        "The sum is the ",
        term("blend"),
        ". It is added to the token’s row, ",
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
        ...experts.map((e, k) =>
          html("b", { class: "chip" }, `expert ${e}`, html("small", {}, ` ${fixed(weights[k], 2)}`)),
        ),
      ),
    );
    const size = token.layers[0]?.sizes.before;
    box.append(
      html("p", { class: "way-token" }, code(pieces[token.at])),
      html(
        "p",
        { class: "note" },
        known(size) ? `On arriving at the first experts its row has length ${size}. Its way, with the weights:` : "",
      ),
      html("ul", { class: "chosen-of" }, ...ways),
    );
  }

  function atLayer(box, at, depth) {
    scoreBars(box, at, depth >= 2);
    if (depth >= 3) contributions(box, at, depth >= 4);
  }

  function following(box, list) {
    const most = highest(
      list.map(([, p]) => p),
      1e-9,
    );
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
    "aria-label": `Scores of ${scores.length} experts; highest: ${order
      .slice(0, 3)
      .map((e) => `expert ${e} ${scores[e]}`)
      .join(", ")}`,
  });
  scores.forEach((score, e) => {
    const h = Math.max(1, (tall * score) / most);
    const kind = chosen.has(e) ? "score chosen" : choose ? "score rests" : "score";
    root.append(svg("rect", { class: kind, x: e * 10 + 1, y: tall + 1 - h, width: 8, height: h }));
  });
  const plain = experts.length
    ? `Highest: ${order
        .slice(0, 4)
        .map((e) => `expert ${e} (${scores[e]})`)
        .join(", ")}.`
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
  box.append(
    root,
    html("p", { class: "axis-note" }, html("span", {}, "expert 0"), html("span", {}, `expert ${scores.length - 1}`)),
    readout,
  );
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
        html(
          "td",
          { class: "share" },
          html("i", { class: "bar", style: `--w:${clamp(100 * at.shares[k], 0, 100)}%` }),
          percent(at.shares[k]),
        ),
      ),
    ),
  );
  if (at.shares.length > at.experts.length) {
    const share = at.shares.at(-1);
    const bar = html("i", { class: "bar", style: `--w:${clamp(100 * share, 0, 100)}%` });
    const blank = at.blend.map(() => html("td", {}, ""));
    body.append(
      html(
        "tr",
        {},
        html("th", { scope: "row" }, "shared"),
        html("td", {}, ""),
        ...blank,
        html("td", { class: "share" }, bar, percent(share)),
      ),
    );
  }
  if (blended)
    body.append(
      html(
        "tr",
        { class: "sum" },
        html("th", { scope: "row" }, "blend"),
        html("td", { class: "times" }, "="),
        ...row(at.blend),
        html("td", {}, ""),
      ),
    );
  const heads = ["", "weight", ...at.blend.map((_, i) => String(i + 1)), "part of the blend"];
  const head = html("thead", {}, html("tr", {}, ...heads.map((name) => html("th", { scope: "col" }, name))));
  const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": "What each chosen expert gives" };
  box.append(
    html(
      "div",
      region,
      html(
        "table",
        { class: "parts" },
        html("caption", {}, `The first ${at.blend.length} numbers of each row`),
        head,
        body,
      ),
    ),
  );
  if (blended) {
    const { before, after, blend } = at.sizes;
    box.append(
      html("p", { class: "note" }, `The blend has length ${blend}; the token’s row goes from ${before} to ${after}.`),
    );
  }
}
