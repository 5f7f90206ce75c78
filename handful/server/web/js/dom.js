// Making elements. Text goes in as text: nothing that a model wrote is ever read as HTML.

export const find = (css, root = document) => root.querySelector(css);
export const findAll = (css, root = document) => [...root.querySelectorAll(css)];

/** An element. props: properties by name; `class`, `data`, `aria`, `on` (listeners) and `css` (custom properties). */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "class") node.className = value;
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "aria") for (const [key, of] of Object.entries(value)) node.setAttribute(`aria-${key}`, of);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "css") for (const [key, of] of Object.entries(value)) node.style.setProperty(key, of);
    else if (name in node && name !== "role" && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Replace what a node holds. */
export const fill = (node, ...children) =>
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));

/** A token's text as people can see it: in quotes, spaces and line ends shown. */
export function shown(text) {
  if (text === "") return "a part of a character";
  const seen = text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
  // A space inside or before a word is plain enough; one alone is not.
  return `“${/^[␣↵⇥]+$/.test(seen) ? seen : seen.replace(/␣/g, " ")}”`;
}

const COUNT = new Intl.NumberFormat("en");
export const count = (n) => COUNT.format(n);

/** 1374208 → "1.37 M", with the unit that is asked for behind it. */
export function short(n, unit = "") {
  const steps = [[1e12, "T"], [1e9, unit === "B" ? "G" : "B"], [1e6, "M"], [1e3, "k"]];
  for (const [size, letter] of steps) {
    if (n >= size) return `${Number((n / size).toPrecision(3))}\u00a0${letter}${unit}`;
  }
  return unit ? `${Number(n.toPrecision(3))}\u00a0${unit}` : String(n);
}

export const percent = (share) => {
  const value = 100 * share;
  return `${value >= 10 || value === 0 ? Math.round(value) : Number(value.toPrecision(2))}\u00a0%`; // a space that does not break
};

export const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;

/** What work calls for, at most once a frame. */
export function onFrame(work) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      work();
    });
  };
}
