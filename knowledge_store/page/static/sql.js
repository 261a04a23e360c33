// Any SELECT statement over the store.
import { make } from "./dom.js";
import { link, rename } from "./places.js";
import { statementArea } from "./statement.js";

const FIRST = "SELECT token_text, count(*) AS times, avg(-token_logprob) AS surprise\nFROM positions\nWHERE is_target\nGROUP BY token_text\nORDER BY times DESC\nLIMIT 20";

export function sqlPage(store, { parameters }) {
  const outcome = statementArea({ dumps: Object.keys(store.facts), title: "Answer" });
  const box = make("textarea", { id: "sql", rows: "9", spellcheck: "false", autocapitalize: "off", autocomplete: "off", wrap: "soft", "aria-describedby": "sql-help" });
  box.value = parameters.q || FIRST;
  const run = () => {
    rename("sql", [], { q: box.value });
    outcome.start(box.value);
  };
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    }
  });
  const kinds = Object.values(store.facts).flatMap((facts) => facts.kinds);
  const relations = [...new Set(["positions", "candidates", "sequences", "tokens", "shards", "dumps",
    ...kinds, ...(kinds.includes("saliency") ? ["rationales"] : []), ...store.files])];
  return {
    title: "SQL",
    body: [
      make("div.hero", {},
        make("h1", {}, "SQL"),
        make("p.quiet", { id: "sql-help" }, "One SELECT statement. It reads this store and nothing else, in a process of its own, within 2 GiB. ",
          "Rows that name a sequence lead to it. Ctrl+Enter runs it.")),
      make("form.card", { onsubmit: (event) => { event.preventDefault(); run(); } },
        make("label", { for: "sql" }, "Statement"), box,
        make("p.buttons", {}, make("button", { type: "submit" }, "Run"),
          make("span.chips", {}, relations.map((relation) =>
            make("a.chip", { href: link("sql", [], { q: `DESCRIBE ${relation}` }), title: `columns of ${relation}` }, relation))))),
      outcome.area,
    ],
    shown: () => outcome.show(box.value),
  };
}
