// Answers as tables, whose rows lead to their sequences, and as bars.
import { make, number, quoted, say, visible } from "./dom.js";
import { link } from "./places.js";

const TEXTS = /(^|_)text$|^token$/; // columns of tokens' texts
const SHARES = new Set(["tail", "coverage", "probability", "likeliest", "teacher", "student", "share", "confidence"]);

function cell(value, column) {
  if (value === null) return make("td.none", { title: "null" }, "–");
  if (typeof value === "number") return make("td.number", {}, /(^|_)(id|row|position|shard|document)$/.test(column.name) ? String(value) : number(value, 4));
  if (typeof value === "boolean") return make("td", {}, value ? "yes" : "no");
  if (TEXTS.test(column.name) && typeof value === "string") return make("td.words", {}, quoted(value));
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return make("td.words", {}, make("bdi", {}, visible(text)));
}

// The sequence, and the position, that a row of an answer is about; null where it names none that there is.
function target(row, places, dumps) {
  const known = (name) => (places[name] === undefined ? undefined : row[places[name]]);
  const dump = known("dump") ?? (dumps.length === 1 && places.dump === undefined ? dumps[0] : null);
  const id = known("sequence_id");
  if (!dumps.includes(dump) || (typeof id !== "number" && typeof id !== "string")) return null;
  const at = known("position");
  return link("sequence", [dump, String(id)], { at: typeof at === "number" ? at : null });
}

export function table(answer, dumps, caption) {
  const places = Object.fromEntries(answer.columns.map((column, place) => [column.name.toLowerCase(), place]));
  const targets = answer.rows.map((row) => target(row, places, dumps));
  const linked = targets.some(Boolean);
  const numeric = (column) => /int|float|double|decimal/.test(column.type) && !column.type.includes("list");
  const head = answer.columns.map((column) => make(numeric(column) ? "th.number" : "th", { scope: "col" }, visible(column.name)));
  const body = answer.rows.map((row, place) =>
    make("tr", {},
      linked && make("td.go", {}, targets[place] && make("a", { href: targets[place], "aria-label": `Read the sequence of row ${place + 1}` }, "Read")),
      row.map((value, column) => cell(value, answer.columns[column]))));
  const limited = answer.rows.length === Number(/\bLIMIT\s+(\d+)\s*;?\s*$/i.exec(answer.sql)?.[1]);
  const more = answer.more ? ", and there are more" : limited ? ", as many as the statement asks for" : "";
  const size = `${answer.rows.length.toLocaleString("en")} ${answer.rows.length === 1 ? "row" : "rows"}${more}`;
  say(size);
  return make("figure.answer", {},
    make("figcaption.quiet", {}, caption ? `${caption}: ${size}` : size),
    make("div.scroll", { tabindex: "0", role: "region", "aria-label": caption || "Answer" },
      make("table", {}, make("thead", {}, make("tr", {}, linked && make("th", {}, make("span.unseen", {}, "Link")), head)), make("tbody", {}, body))));
}

// One panel of bars for each of some columns, over the labels of the first.
export function bars(answer, picture) {
  const [label, ...names] = picture;
  const place = (name) => answer.columns.findIndex((column) => column.name === name);
  const at = label ? place(label) : 0;
  const shown = names.filter((name) => place(name) >= 0);
  if (!answer.rows.length || at < 0) return null;
  return make("div.panels", {}, shown.map((name) => {
    const values = answer.rows.map((row) => row[place(name)]);
    const most = SHARES.has(name) ? 1 : Math.max(...values.filter((value) => typeof value === "number"), 0) || 1;
    const lines = answer.rows.map((row, index) => {
      const bar = make("span.bar");
      bar.style.setProperty("--part", String(Math.max(0, Math.min(1, (values[index] || 0) / most))));
      return make("li", {},
        make("bdi.label", {}, row[at] === null ? "null" : visible(row[at])), make("span.track", { "aria-hidden": "true" }, bar),
        make("span.value", {}, number(values[index], 3)));
    });
    return make("section.panel", {}, make("h3", {}, name), make("ol.bars", {}, lines));
  }));
}
