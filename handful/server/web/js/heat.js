// Colours of a load, from the style sheet's own, so that light and dark have each their own.

import { percent } from "./dom.js";

/** The colours of now: what was asked of the style sheet, as [r, g, b] and as text. */
export function colours() {
  const style = getComputedStyle(document.documentElement);
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const of = (name) => {
    probe.fillStyle = resolved(style.getPropertyValue(name).trim());
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const names = ["none", "heat", "more", "less", "ink", "muted", "accent"];
  return Object.fromEntries(names.map((name) => [name, of(`--${name}`)]));
}

/** light-dark(…) as the colour that it is now: a canvas does not know it. */
function resolved(value) {
  const probe = document.querySelector("#probe");
  probe.style.color = value;
  return getComputedStyle(probe).color;
}

export const css = ([r, g, b]) => `rgb(${Math.round(r)} ${Math.round(g)} ${Math.round(b)})`;
export const mix = (a, b, t) => a.map((value, i) => value + (b[i] - value) * t);

export const FULL = 4; // times the even load, from which on the colour is the fullest

/** How full the colour of a relative load is, 0 to 1: even is a third of it. */
export const fullness = (load) => (load <= 0 ? 0 : 0.08 + 0.92 * Math.min(1, Math.log2(1 + load) / Math.log2(1 + FULL)));

/** How full the colour of a difference of two relative loads is, −1 to 1. */
export const difference = (delta) => Math.sign(delta) * Math.min(1, Math.sqrt(Math.abs(delta) / FULL));

export function heatOf(value, kind, palette) {
  if (kind === "difference") {
    const t = difference(value);
    return mix(palette.none, t > 0 ? palette.more : palette.less, Math.abs(t));
  }
  return mix(palette.none, palette.heat, fullness(value));
}

export function sayLoad(value, kind, experts) {
  if (value === null) return "nothing has run";
  if (kind === "difference") {
    const points = (100 * value) / experts;
    if (Math.abs(points) < 0.005) return "as much in both";
    return `${Math.abs(points).toFixed(1)} points ${points > 0 ? "more in B" : "less in B"}`;
  }
  return `${percent(value / experts)} of the assignments, ${value.toFixed(value < 10 ? 1 : 0)} times the even load`;
}
