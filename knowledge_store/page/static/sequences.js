// A page of a dump's sequences.
import { get } from "./api.js";
import { counted } from "./counted.js";
import { make, quoted, rows, visible, whole } from "./dom.js";
import { link } from "./places.js";

export async function sequencesPage(store, { path: [name], parameters }) {
  if (!Object.hasOwn(store.facts, name)) throw new Error(`This store has no dump ${JSON.stringify(name)}.`);
  const found = await get("sequences", { dump: name, page: parameters.page || "1" });
  const beginnings = new Map(rows(found.beginnings).map((row) => [row.sequence_id, row.beginning]));
  const at = (page) => link("sequences", [name], { page: page === 1 ? null : page });
  const columns = store.facts[name].columns;
  const items = rows(found.sequences).map((row) => make("li", {},
    make("a.sequence", { href: link("sequence", [name, String(row.sequence_id)]) },
      make("span.beginning", {}, beginnings.has(row.sequence_id) ? quoted(beginnings.get(row.sequence_id), "bdi") : `sequence ${row.sequence_id}`),
      make("span.meta.quiet", {},
        make("bdi", {}, `${visible(row.file)} row ${row.row}`), ` · ${whole(row.length)} tokens · ${whole(row.targets)} targets`,
        columns.slice(0, 4).map((column) => row[column] === null ? null : make("span.tag", {}, make("bdi", {}, `${visible(column)}: ${visible(String(row[column])).slice(0, 60)}`)))))));
  const jump = make("input", { type: "number", min: 1, max: found.pages, value: found.page, id: "page" });
  const pager = () => make("nav.pager", { "aria-label": "Pages of sequences" },
    found.page > 1 ? make("a.button.plain", { href: at(found.page - 1), rel: "prev" }, "← Before") : make("span"),
    make("span.quiet", {}, `page ${whole(found.page)} of ${whole(found.pages)}`),
    found.page < found.pages ? make("a.button.plain", { href: at(found.page + 1), rel: "next" }, "After →") : make("span"));
  return {
    title: `Sequences of ${name}`,
    body: [
      make("div.hero", {},
        make("p.trail", {}, make("a", { href: "#/" }, "Dumps"), " / ", make("a", { href: link("dump", [name]) }, make("bdi", {}, name))),
        make("h1", {}, "Sequences"),
        make("p.quiet", {}, `${whole(found.total)} of them. `, counted("This page of sequences", found.sequences, found.beginnings)),
        found.pages > 1 ? make("form.row", { onsubmit: (event) => { event.preventDefault(); location.hash = at(Number(jump.value)); } },
          make("label", { for: "page" }, "Page"), jump, make("button.plain", { type: "submit" }, "Go")) : null),
      items.length ? make("ol.sequences", {}, items) : make("p.notice", {}, "No shard is committed yet."),
      found.pages > 1 ? pager() : null,
    ],
  };
}
