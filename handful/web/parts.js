"use strict";
// What the pages of web/ share: elements, maps that are looked at, and the button for the theme. It stands before a page's own script.

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") node.style.cssText = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}
const html = (tag, attributes = {}, ...children) => make(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// A map whose cells pointer, finger and arrow keys look at. grid(): as it is drawn, null before it is; cell(x, y): the
// row and column at a place of it; focus(): those that were looked at last, null before.
function lookAt(root, { grid, cell, focus, look }) {
  function follow(event) {
    if (!grid()) return;
    const box = root.getBoundingClientRect();
    const zoom = grid().width / box.width;
    look(...cell((event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom));
  }
  root.addEventListener("pointermove", follow);
  root.addEventListener("pointerdown", follow);
  root.addEventListener("keydown", (event) => {
    const by = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!by || !grid()) return;
    event.preventDefault();
    const now = focus();
    if (now) look(now[0] + by[0], now[1] + by[1]);
    else look(0, 0);
  });
}

// The theme: light, dark, or as the system has it.
function theme(button) {
  const names = ["auto", "light", "dark"];
  let stored = null;
  try {
    stored = localStorage.getItem("handful-theme");
  } catch {
    /* a page from a file may have no storage */
  }
  let now = names.includes(stored) ? stored : "auto";
  function apply() {
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${now}`;
  }
  button.addEventListener("click", () => {
    now = names[(names.indexOf(now) + 1) % names.length];
    try {
      localStorage.setItem("handful-theme", now);
    } catch {
      /* then it holds until the page closes */
    }
    apply();
  });
  button.hidden = false;
  apply();
}
