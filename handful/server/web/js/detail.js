// The panel of what was clicked: a token's page or an expert's.

import { find, findAll } from "./dom.js";
import { drawExpert, expertKey } from "./expert.js";
import { drawToken, tokenKey } from "./path.js";
import { change, state } from "./state.js";

const root = find("#detail");
let drawn = null; // what is in it: it is drawn anew when that changes,
let pressed = false; // but not under a finger, whose click would be lost
let back = null; // where the focus goes when it is closed

root.addEventListener("pointerdown", () => (pressed = true));
for (const end of ["pointerup", "pointercancel"]) {
  addEventListener(end, () => {
    if (pressed) setTimeout(() => ((pressed = false), change())); // after the click
  });
}
find("#detail-close").addEventListener("click", close);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.pick && !event.target.closest("#tour, dialog")) close();
});

function close() {
  const { pick } = state;
  change({ pick: null });
  back?.(pick)?.focus({ preventScroll: true });
}

/** node: the element that a pick was made on. */
export const onClose = (node) => (back = node);

export function drawDetail() {
  const gone = state.pick?.kind === "token" && !state.pick.run.tokens[state.pick.index];
  const pick = gone ? null : state.pick;
  root.hidden = pick === null;
  document.body.classList.toggle("picked", pick !== null);
  if (!pick) {
    drawn = null;
    return;
  }
  const token = pick.kind === "token";
  const now = token ? tokenKey() : expertKey();
  if (drawn && JSON.stringify(now) === JSON.stringify(drawn)) return;
  if (drawn && pressed) return;
  // The keyboard's focus outlives the drawing: it stands on the same button of the new page.
  const inside = root.contains(document.activeElement) ? findAll("button", root).indexOf(document.activeElement) : -1;
  (token ? drawToken : drawExpert)(find("#detail-body"), find("#detail-title"));
  if (inside >= 0) findAll("button", root)[inside]?.focus({ preventScroll: true });
  if (drawn?.[0] !== now[0]) root.scrollTop = 0;
  drawn = now;
}
