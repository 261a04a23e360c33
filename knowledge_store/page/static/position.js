// One position: what the teacher expected there, and each student.
import { counted } from "./counted.js";
import { make, number, quoted, replace, rows, say, share, visible } from "./dom.js";

function line(label, probability, { marked = false, kind = "", detail = null } = {}) {
  const bar = make(`span.bar${kind ? `.${kind}` : ""}`);
  bar.style.setProperty("--part", String(Math.max(0, Math.min(1, probability ?? 0))));
  return make(marked ? "li.marked" : "li", {}, make("span.label", {}, label, marked ? make("span.unseen", {}, " (the token of the text)") : null),
    make("span.track", { "aria-hidden": "true" }, bar), make("span.value", {}, detail ?? share(probability)));
}

function teacher(token, known) {
  const [prediction] = rows(known.prediction);
  const candidates = rows(known.candidates);
  if (!prediction || prediction.tail === null) {
    return [make("p.quiet", {}, prediction && prediction.position === 0 ? "Nothing stands before the first token: there is no prediction of it."
      : "Nothing is kept of this position: it is context, and does not count for training.")];
  }
  const own = candidates.find((candidate) => candidate.token_id === prediction.token_id);
  const lines = candidates.map((candidate) => line(quoted(candidate.token_text), candidate.probability, { marked: candidate === own }));
  lines.push(line("all others", prediction.tail, { kind: "tail" }));
  if (!own && prediction.probability !== null) {
    lines.push(line(quoted(prediction.token_text), prediction.probability, { marked: true, kind: "tail" }));
  }
  return [
    make("dl.figures.small", {},
      figure("probability", prediction.probability === null ? "not kept" : share(prediction.probability, 2)),
      figure("surprise", prediction.probability === null ? "not kept" : `${number(-Math.log(prediction.probability), 2)} nats`),
      prediction.teacher_entropy === undefined || prediction.teacher_entropy === null ? null : figure("entropy", `${number(prediction.teacher_entropy, 2)} nats`)),
    make("h3", {}, "What the teacher expected"),
    make("ol.bars.candidates", {}, lines),
    counted("The prediction of this position", known.prediction, known.candidates),
  ];
}

function draws(answer) {
  const drawn = rows(answer);
  if (!drawn.length) return null;
  return make("section.beside", {}, make("h3", {}, "Drawn from the others"),
    make("p.chips", {}, drawn.map((draw) => make("span.chip", {}, quoted(draw.token_text), draw.times > 1 ? ` ×${draw.times}` : ""))),
    counted("The draws of this position", answer));
}

function figure(name, value) {
  return make("div.figure", {}, make("dt", {}, name), make("dd", {}, value));
}

function student(name, answer, prediction) {
  const [row] = rows(answer);
  if (!row) return null;
  const kl = row.kl ?? row.kl_lower_bound;
  return make("section.beside", {},
    make("h3", {}, "Student ", make("bdi", {}, visible(name))),
    make("dl.figures.small", {},
      kl === undefined || kl === null ? null : figure(row.kl === undefined ? "KL, at least" : "KL to the teacher", `${number(kl, 3)} nats`),
      "agrees" in row ? figure("same likeliest token", row.agrees ? "yes" : "no") : null),
    make("ol.bars.candidates", {},
      prediction ? line("token: teacher", prediction.probability, { kind: "teacher" }) : null,
      line("token: student", row.probability, { kind: "student" }),
      "likeliest_text" in row ? line(make("span", {}, "likeliest ", quoted(row.likeliest_text)), row.confidence, { kind: "student" }) : null),
    counted(`What ${name} makes of this position`, answer));
}

// The panel beside the text. `close` is called by its button.
export function positionPanel(close) {
  const body = make("div");
  const empty = () => replace(body, make("p.quiet", {}, "Choose a token to see what was expected in its place. With the keyboard: Tab to the text, then the arrow keys."));
  const element = make("aside.card.position", { "aria-label": "The chosen position" }, body);
  const head = (token) => make("header", {}, make("h2", {}, quoted(token.token_text), make("span.quiet", {}, ` at ${token.position}`)),
    make("button.plain.close", { type: "button", onclick: close, "aria-label": "Close" }, "×"));
  empty();
  return {
    element,
    clear: () => {
      element.classList.remove("open");
      empty();
    },
    wait: (token) => {
      element.classList.add("open");
      if (!body.querySelector("header")) replace(body, head(token), make("p.quiet", {}, "…"));
    },
    show: (token, known) => {
      const [prediction] = rows(known.prediction);
      replace(body, head(token), known.prediction ? teacher(token, known) : make("p.quiet", {}, "This dump keeps no predictions."),
        Object.entries(known.students).map(([name, answer]) => student(name, answer, prediction)), draws(known.draws));
      const [first] = rows(known.candidates);
      if (prediction && prediction.probability !== null) {
        say(`Probability ${share(prediction.probability)}${first ? `, likeliest ${visible(first.token_text ?? "")} ${share(first.probability)}` : ""}, others ${share(prediction.tail)}`);
      }
    },
    fail: (error) => replace(body, make("p.notice.bad", { role: "alert" }, error.message)),
  };
}
