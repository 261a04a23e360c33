// The dumps of the store.
import { counted } from "./counted.js";
import { bytes, make, number, rows, share, visible, whole } from "./dom.js";
import { link } from "./places.js";

// A share of one as a line that is filled so far.
export function gauge(name, value, words) {
  if (typeof value !== "number") return null;
  const bar = make("span.bar");
  bar.style.setProperty("--part", String(Math.max(0, Math.min(1, value))));
  return make("div.gauge", { title: words },
    make("span.name", {}, name), make("span.value", {}, share(value)), make("span.track", { "aria-hidden": "true" }, bar));
}

export function figure(name, value, words = null) {
  return make("div.figure", { title: words }, make("dt", {}, name), make("dd", {}, value));
}

export function gauges(facts) {
  const coverage = facts["positions.mean_top_k_mass"];
  return [
    gauge("coverage", coverage, "the probability of the candidates, on average"),
    typeof coverage === "number" ? gauge("tail", 1 - coverage, "the probability of all tokens that are no candidates, on average") : null,
    gauge("top-1 accuracy", facts["positions.mean_top_1_accuracy"], "how often the likeliest token is the one that stands there"),
  ];
}

// The last part of a path or of a hub's name; a sentence, as an import has it, stays whole.
function shortTeacher(name) {
  return /[, ]/.test(name) ? name : name.replace(/\/+$/, "").split("/").pop();
}

function card(store, facts) {
  const about = store.facts[facts.dump];
  const loss = facts["positions.mean_nll"];
  return make("article.card.dump", {},
    make("header", {},
      make("h2", {}, make("a", { href: link("dump", [facts.dump]) }, make("bdi", {}, facts.dump))),
      make("p.quiet", {}, "teacher ", make("bdi", {}, shortTeacher(about.teacher))),
      facts.complete ? null : make("span.badge", {}, `${whole(facts.shards)} of ${whole(facts.shards_planned)} shards`)),
    make("dl.figures", {},
      figure("sequences", whole(facts.sequences)),
      figure("positions", whole(facts.positions)),
      figure("on disk", bytes(facts.bytes)),
      typeof loss === "number" ? figure("teacher's loss", number(loss, 3), `nats a token; perplexity ${number(Math.exp(loss), 2)}`)
        : figure("bytes a position", number(facts.bytes_per_position, 1))),
    make("div.gauges", {}, gauges(facts)),
    make("p.chips", {}, about.kinds.map((kind) => make("span.chip", {}, kind))),
    make("p.buttons", {},
      make("a.button", { href: link("sequences", [facts.dump]) }, "Read"),
      make("a.button.plain", { href: link("dump", [facts.dump]) }, "Facts and pictures"),
      make("a.button.plain", { href: link("ask", ["unsure"], { dump: facts.dump }) }, "Ask")));
}

export function overviewPage(store) {
  const dumps = rows(store.dumps);
  const total = (name) => dumps.reduce((sum, facts) => sum + (facts[name] || 0), 0);
  const closed = Object.entries(store.closed).map(([name, sentence]) =>
    make("p.notice.bad", {}, make("b", {}, make("bdi", {}, visible(name))), " is closed: ", sentence));
  return {
    title: "Dumps",
    body: [
      make("div.hero", {},
        make("h1", {}, "What the teacher knows"),
        make("p.quiet", {}, make("code", {}, store.address)),
        dumps.length ? make("p.lead", {}, `${whole(dumps.length)} ${dumps.length === 1 ? "dump" : "dumps"}, `,
          `${whole(total("sequences"))} sequences, ${whole(total("positions"))} positions, ${bytes(total("bytes"))}. `,
          counted("The facts of all dumps", store.dumps)) : null),
      closed,
      dumps.length ? make("div.cards", {}, dumps.map((facts) => card(store, facts)))
        : closed.length ? null : make("p.notice", {}, "There is no dump yet: `teacher-dump run` makes one."),
      dumps.length ? questions(store, dumps) : null,
    ],
  };
}

function questions(store, dumps) {
  const students = Object.keys(store.students);
  // A student's file is of one dump; which one, its question says.
  const names = ["unsure", "garbled", ...(students.length ? ["student"] : ["surprised"])];
  return make("section", {},
    make("h2", {}, "Begin with a question"),
    make("div.cards.questions", {}, names.map((name) =>
      make("a.card.question", { href: link("ask", [name], { dump: dumps.length === 1 ? dumps[0].dump : null }) },
        make("b", {}, store.questions[name].title), make("span.quiet", {}, store.questions[name].words)))));
}
