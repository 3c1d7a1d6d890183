"use strict";
// Refreshes the changing parts of the page in place, without touching the search field.
const every = 5000;
const parts = ["verdict", "devices", "state", "footer"];
const stale = document.getElementById("stale");
let answered = new Date();

async function refresh() {
  try {
    if (!document.hidden && getSelection().isCollapsed) {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(every) });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        for (const id of parts) {
          document.getElementById(id).replaceChildren(...fresh.getElementById(id).childNodes);
        }
        document.title = fresh.title;
      }
      if (answer.ok || answer.status === 429) {
        answered = new Date();
        stale.hidden = true;
      }
    }
  } catch {
    // The gateway has stopped, or the network between.
  }
  if (new Date() - answered > 2 * every && !document.hidden && getSelection().isCollapsed) {
    stale.querySelector("span").textContent = answered.toLocaleTimeString();
    stale.hidden = false;
  }
  setTimeout(refresh, every);
}
setTimeout(refresh, every);
