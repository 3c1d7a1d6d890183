"use strict";
// Refreshes the changing parts of the page in place, without touching the search field; shows times in the local zone.
const every = 5000;
const parts = ["verdict", "devices", "state", "footer"];
const stale = document.getElementById("stale");
// Swedish dates are those of ISO 8601, as in the log.
const day = new Intl.DateTimeFormat("sv", { year: "numeric", month: "2-digit", day: "2-digit" });
const clock = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit", minute: "2-digit", second: "2-digit", timeZoneName: "short",
});
let answered = new Date();

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
        localize(fresh);
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
    stale.querySelector("span").textContent = clock.format(answered);
    stale.hidden = false;
  }
  setTimeout(refresh, every);
}
localize(document);
setTimeout(refresh, every);
