"use strict";
// What the pages of web/ share: elements, and the button for the theme. It stands before a page's own script.

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
