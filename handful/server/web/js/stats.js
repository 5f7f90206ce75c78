// What a text says of its experts, and how much of it chance would say as well.

/** How the tokens of a text that an expert took compare with chance, text by text, what is most above chance first.
 *
 * An expert takes a share p of all tokens. Of n tokens with one text it would by chance take n·p; it took k. `chance` is the
 * probability of k or more of n, times the number of texts that were looked at (Bonferroni). */
export function aboveChance(run, layer, expert) {
  const { routing, tokens } = run;
  const rows = Math.min(routing.rows, tokens.length);
  const found = new Map();
  let total = 0;
  for (let i = 0; i < rows; i++) {
    const one = found.get(tokens[i].id) ?? { id: tokens[i].id, text: tokens[i].text, taken: 0, of: 0 };
    one.of += 1;
    if (routing.took(i, layer, expert)) {
      one.taken += 1;
      total += 1;
    }
    found.set(tokens[i].id, one);
  }
  const share = rows ? total / rows : 0;
  const kinds = [...found.values()].filter((one) => one.taken > 0);
  for (const one of kinds) {
    one.expected = one.of * share;
    one.ratio = one.taken / one.expected;
    one.chance = Math.min(1, found.size * tail(one.taken, one.of, share));
  }
  kinds.sort((a, b) => a.chance - b.chance || b.taken - b.expected - (a.taken - a.expected) || b.taken - a.taken);
  return { rows, total, share, kinds };
}

/** P(X ≥ k) of a binomial X of n tries with probability p. */
export function tail(k, n, p) {
  if (k <= 0 || p >= 1) return 1;
  if (p <= 0) return 0;
  let sum = 0;
  let log = 0; // of n over i
  for (let i = 0; i <= n; i++) {
    if (i > 0) log += Math.log((n - i + 1) / i);
    if (i >= k) sum += Math.exp(log + i * Math.log(p) + (n - i) * Math.log1p(-p));
  }
  return Math.min(1, sum);
}

/** The load of a layer beside an even load: for each expert its share times E; null where nothing ran. */
export function relative(counts) {
  let sum = 0;
  for (const value of counts) sum += value;
  return sum ? Float64Array.from(counts, (value) => (value * counts.length) / sum) : null;
}

/** (largest load − mean load) / mean load. */
export const maxVio = (load) => Math.max(...load) - 1;

// As `handful serve` counts them: a load under 1 % of an even one, and only after that many assignments an expert.
export const DEAD = 0.01;
export const ENOUGH = 100;
