"use strict";
// Refreshes the changing parts of the page in place, without touching the search field or what the reader has folded;
// shows times in the local zone.
const every = 5000;
const parts = ["verdict", "devices", "state", "footer"];
const stale = document.getElementById("stale");
// Swedish dates are those of ISO 8601, as in the log.
const day = new Intl.DateTimeFormat("sv", { year: "numeric", month: "2-digit", day: "2-digit" });
const clock = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short",
});
// Whether the reader has left a part open, by its name.
const left = new Map();
let answered = new Date();

document.addEventListener("click", event => {
  const fold = event.target.closest("summary")?.parentElement;
  if (fold) left.set(fold.dataset.name, !fold.open);
});

function prepare(root) {
  localize(root);
  for (const each of root.querySelectorAll("details")) {
    each.open = left.get(each.dataset.name) ?? each.open;
  }
}

function replace(fresh) {
  const focused = document.activeElement?.closest("summary")?.parentElement.dataset.name;
  for (const id of parts) {
    document.getElementById(id).replaceChildren(...fresh.getElementById(id).childNodes);
  }
  if (focused !== undefined) {
    document.querySelector(`details[data-name="${CSS.escape(focused)}"] > summary`)?.focus({ preventScroll: true });
  }
}

function localize(root) {
  const today = day.format(new Date());
  for (const each of root.querySelectorAll("time")) {
    const moment = new Date(each.dateTime);
    const date = day.format(moment);
    each.title = each.textContent;
    each.textContent = (date === today ? "" : `${date} `) + clock.format(moment);
  }
}

async function refresh() {
  try {
    if (!document.hidden && getSelection().isCollapsed) {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(every) });
      if (answer.ok) {
        const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
        prepare(fresh);
        replace(fresh);
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
    stale.querySelector("span").textContent = clock.format(answered);
    stale.hidden = false;
  }
  setTimeout(refresh, every);
}
prepare(document);
setTimeout(refresh, every);
