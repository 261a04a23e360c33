// One dump: its facts, and pictures of its shards.
import { get } from "./api.js";
import { counted } from "./counted.js";
import { bytes, draw, folded, make, number, rows, visible, whole } from "./dom.js";
import { figure, gauges } from "./overview.js";
import { link } from "./places.js";

const WIDTH = 320;
const HEIGHT = 96;
const COLUMNS = 40; // of the corpus that are shown unasked
const NAMES = {
  "positions.mean_nll": ["Teacher's loss", "nats a token"],
  "positions.mean_top_k_mass": ["Coverage", "probability of the candidates"],
  "positions.mean_top_1_accuracy": ["Top-1 accuracy", "of the teacher on the text"],
};

// A statistic of each group of shards, in the order of the corpus.
function chart(name, places, values) {
  const known = values.filter((value) => typeof value === "number");
  if (!known.length) return null;
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const from = low - 0.15 * (high - low || Math.abs(high) || 1);
  const to = high + 0.15 * (high - low || Math.abs(high) || 1);
  const x = (place) => (values.length === 1 ? WIDTH / 2 : (place / (values.length - 1)) * (WIDTH - 12) + 6);
  const y = (value) => HEIGHT - ((value - from) / (to - from)) * HEIGHT;
  const points = values.map((value, place) => (typeof value === "number" ? [x(place), y(value)] : null)).filter(Boolean);
  const path = points.map(([left, top], place) => `${place ? "L" : "M"}${left.toFixed(1)} ${top.toFixed(1)}`).join("");
  const [title, unit] = NAMES[name] || [name, ""];
  const words = `${title} by shard: from ${number(low, 4)} to ${number(high, 4)}${unit ? `, ${unit}` : ""}`;
  return make("figure.chart.card", {},
    make("figcaption", {}, make("b", {}, title), make("span.quiet", {}, unit)),
    draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words },
      points.length > 1 && draw("path", { class: "area", d: `${path}L${points.at(-1)[0].toFixed(1)} ${HEIGHT}L${points[0][0].toFixed(1)} ${HEIGHT}Z` }),
      draw("path", { class: "line", d: path }),
      points.length <= 24 && points.map(([left, top]) => draw("circle", { cx: left.toFixed(1), cy: top.toFixed(1), r: 3 }))),
    make("p.range.quiet", {}, make("span", {}, `${number(low, 3)} – ${number(high, 3)}`), make("span", {}, `shards ${whole(places[0])} to ${whole(places.at(-1))}`)));
}

// The facts of a dump that are not shown in a picture, by kind.
function facts(dump) {
  const shown = new Set(["dump", "sequences", "positions", "bytes", "complete", ...Object.keys(NAMES)]);
  return Object.entries(dump).filter(([name, value]) => !shown.has(name) && value !== null).map(([name, value]) =>
    make("div", {}, make("dt", {}, name.replace(/_/g, " ").replace(".", ": ")),
      make("dd", {}, make("bdi", {}, /bytes$/.test(name) ? bytes(value) : typeof value === "number" ? number(value, 4) : typeof value === "boolean" ? (value ? "yes" : "no") : String(value)))));
}

export async function dumpPage(store, { path: [name] }) {
  const dump = rows(store.dumps).find((row) => row.dump === name);
  if (!dump) throw new Error(`This store has no dump ${JSON.stringify(name)}.`);
  const { shards } = await get("dump", { dump: name });
  const groups = rows(shards);
  const about = store.facts[name];
  const charts = shards.columns.map((column) => column.name).filter((column) => column.includes("."))
    .map((column) => chart(column, groups.map((group) => group.shard), groups.map((group) => group[column])));
  return {
    title: name,
    body: [
      make("div.hero", {},
        make("p.trail", {}, make("a", { href: "#/" }, "Dumps")),
        make("h1", {}, make("bdi", {}, name)),
        make("p.quiet", {}, "teacher ", make("code", {}, about.teacher)),
        make("p.buttons", {},
          make("a.button", { href: link("sequences", [name]) }, "Read its sequences"),
          make("a.button.plain", { href: link("search", [], { dump: name }) }, "Search"),
          make("a.button.plain", { href: link("ask", [], { dump: name }) }, "Ask questions"))),
      make("section.card.sides", {},
        make("dl.figures", {},
          figure("sequences", whole(dump.sequences)), figure("positions", whole(dump.positions)),
          figure("on disk", bytes(dump.bytes)), figure("bytes a position", number(dump.bytes_per_position, 2)),
          typeof dump["positions.mean_nll"] === "number" ? figure("teacher's loss", `${number(dump["positions.mean_nll"], 3)} nats`) : null,
          typeof dump["positions.mean_nll"] === "number" ? figure("perplexity", number(Math.exp(dump["positions.mean_nll"]), 2)) : null),
        make("div.gauges", {}, gauges(dump)),
        counted(`The facts of ${name}`, store.dumps)),
      groups.length > 1 && charts.some(Boolean) ? make("section", {},
        make("h2", {}, "Through the corpus"),
        make("p.quiet", {}, "Means of the shards, in the order of the corpus. ", counted("The pictures of the shards", shards)),
        make("div.charts", {}, charts)) : null,
      about.columns.length && about.kinds.includes("positions") ? make("section", {},
        make("h2", {}, "By a column of the corpus"),
        make("p.quiet", {}, "Coverage, tail and loss of each of its values. This reads the whole dump."),
        make("p.chips", {}, folded(about.columns.map((column) =>
          make("a.chip", { href: link("ask", ["column"], { dump: name, column }) }, make("bdi", {}, visible(column)))), COLUMNS, "columns"))) : null,
      make("section", {},
        make("h2", {}, "All facts"),
        make("dl.facts", {}, facts(dump))),
    ],
  };
}
