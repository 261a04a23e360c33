// Which page is shown, by the address.
import { get, signIn, SignedOut } from "./api.js";
import { askPage, questionsPage, searchPage } from "./ask.js";
import { make, replace, say } from "./dom.js";
import { dumpPage } from "./dump.js";
import { overviewPage } from "./overview.js";
import { place } from "./places.js";
import { sequencePage } from "./sequence.js";
import { sequencesPage } from "./sequences.js";
import { sqlPage } from "./sql.js";
import { stopRunning } from "./statement.js";

const VIEWS = {
  "": overviewPage,
  dump: dumpPage,
  sequences: sequencesPage,
  sequence: sequencePage,
  ask: (store, asked) => (asked.path.length ? askPage : questionsPage)(store, asked),
  search: searchPage,
  sql: sqlPage,
};
const main = document.getElementById("main");
let store = null;
let turn = 0; // of the page that is being made: an older one that comes late is not shown

function shortName(address) {
  return address.replace(/\/+$/, "").split("/").pop() || address;
}

function mark(view) {
  const page = { dump: "", sequences: "", sequence: "" }[view] ?? view;
  for (const anchor of document.querySelectorAll("#pages a")) {
    if (anchor.getAttribute("href") === `#/${page}`) anchor.setAttribute("aria-current", "page");
    else anchor.removeAttribute("aria-current");
  }
}

// Where a page was left, its entry in the history keeps: "back" goes there.
history.scrollRestoration = "manual";

function keepScroll() {
  history.replaceState({ top: scrollY }, "");
}

let keeping = 0;
addEventListener("scroll", () => {
  clearTimeout(keeping);
  keeping = setTimeout(keepScroll, 150); // browsers refuse to be told too often
});
addEventListener("click", (event) => event.target.closest("a[href^='#']") && keepScroll(), { capture: true });

async function show(moved) {
  const mine = ++turn;
  const top = history.state?.top ?? 0;
  clearTimeout(keeping);
  const asked = { ...place(), moved };
  stopRunning();
  mark(asked.view);
  main.setAttribute("aria-busy", "true");
  let page;
  try {
    if (!Object.hasOwn(VIEWS, asked.view)) throw new Error(`This page has no part ${JSON.stringify(asked.view)}.`);
    page = await VIEWS[asked.view](store, asked);
  } catch (error) {
    if (error instanceof SignedOut) return askForToken();
    page = { title: "Not shown", body: [make("h1", {}, "Not shown"), make("p.notice.bad", { role: "alert" }, error.message),
      make("p", {}, make("a", { href: "#/" }, "All dumps"))] };
  }
  if (mine !== turn) return;
  document.title = `${page.title} · ${shortName(store.address)}`;
  replace(main, page.body);
  main.setAttribute("aria-busy", "false");
  if (moved) {
    scrollTo(0, 0);
    main.focus({ preventScroll: true });
    say(page.title);
  }
  await page.shown?.();
  if (mine === turn && top && !scrollY) scrollTo(0, top);
}

function askForToken(sentence = "") {
  const field = make("input", { type: "password", id: "token", autocomplete: "current-password", required: true });
  const form = make("form.card.sign-in", {
    onsubmit: async (event) => {
      event.preventDefault();
      try {
        await signIn(field.value);
      } catch (error) {
        return askForToken(error.message);
      }
      await begin();
    },
  },
  make("h1", {}, "A token, please"),
  make("p.quiet", {}, "This store is served to those who have its token. It is asked for once, and kept in no address and no log."),
  make("label", { for: "token" }, "Token"), field,
  sentence ? make("p.notice.bad", { role: "alert" }, sentence) : null,
  make("p.buttons", {}, make("button", { type: "submit" }, "Open the store")));
  document.title = "Knowledge store";
  replace(main, form);
  field.focus();
}

async function begin() {
  try {
    store = await get("store");
  } catch (error) {
    if (error instanceof SignedOut) return askForToken();
    return replace(main, make("p.notice.bad", { role: "alert" }, error.message));
  }
  document.getElementById("brand").textContent = shortName(store.address);
  await show(false);
}

addEventListener("hashchange", () => store && show(true));
begin();
