// A sequence as text: each token shaded, and what was expected in its place.
import { get } from "./api.js";
import { counted } from "./counted.js";
import { folded, make, number, quoted, replace, rows, share, visible, whole } from "./dom.js";
import { link, rename as nameHere } from "./places.js";
import { positionPanel } from "./position.js";

const LISTED = 8; // of the tokens with the largest values
const COLUMNS = 12; // of the corpus that are shown unasked

// How tokens may be shaded: of each, its name, its unit, and the value that has the full shade.
function measures(found) {
  const columns = new Set(found.tokens.columns.map((column) => column.name));
  const known = [
    { name: "surprise", title: "Surprise", words: "−ln of the probability that the teacher gave to the token (nats)", most: 8, form: (value) => `${number(value, 2)} nats` },
    { name: "tail", title: "Tail", words: "probability of all tokens that are no candidates", most: 1, form: (value) => share(value) },
    { name: "entropy", title: "Entropy", words: "how many tokens could come, in the teacher's eyes (nats)", most: 6, form: (value) => `${number(value, 2)} nats` },
  ].filter((measure) => columns.has(measure.name)).map((measure) => ({ ...measure, answer: found.tokens, column: measure.name }));
  if (found.saliency?.rows.length) {
    const shares = found.saliency.rows.map((row) => row[1]);
    known.push({ name: "saliency", title: "Saliency", words: "share in what decided the answer", most: Math.max(...shares) || 1, form: (value) => share(value), answer: found.saliency, column: "share" });
  }
  for (const [student, answer] of Object.entries(found.students)) {
    if (!answer.rows.length) continue;
    known.push({ name: `student-${student}`, title: `KL of ${student}`, words: `divergence of ${student} from the teacher (nats)`, most: 3, form: (value) => `${number(value, 3)} nats`, answer, column: "kl" });
  }
  return known;
}

function valuesOf(measure) {
  const place = measure.answer.columns.findIndex((column) => column.name === measure.column);
  const at = measure.answer.columns.findIndex((column) => column.name === "position");
  return new Map(measure.answer.rows.map((row) => [row[at], row[place]]).filter(([, value]) => typeof value === "number"));
}

export async function sequencePage(store, { path: [name, id], parameters }) {
  if (!Object.hasOwn(store.facts, name)) throw new Error(`This store has no dump ${JSON.stringify(name)}.`);
  const at = /^\d+$/.test(parameters.at || "") ? Number(parameters.at) : null;
  const from = at !== null ? at - (at % store.window) : Number(parameters.from || 0);
  const found = await get("sequence", { dump: name, id, from });
  const [row] = rows(found.sequence);
  const title = `Sequence ${id}`;
  const hero = make("div.hero", {},
    make("p.trail", {}, make("a", { href: "#/" }, "Dumps"), " / ", make("a", { href: link("dump", [name]) }, make("bdi", {}, name)),
      " / ", make("a", { href: link("sequences", [name]) }, "Sequences")),
    make("h1", {}, `${title}`),
    make("p.quiet", {}, make("bdi", {}, `${visible(row.file)} row ${row.row}`), row.window ? ` · window ${row.window}` : "",
      ` · ${whole(row.length)} tokens · ${whole(row.targets)} targets${row.truncated ? " · cut at the longest length" : ""} `,
      folded(store.facts[name].columns.filter((column) => row[column] !== null)
        .map((column) => make("span.tag", {}, make("bdi", {}, `${visible(column)}: ${visible(String(row[column])).slice(0, 120)}`))), COLUMNS, "columns")),
    neighbours(name, found));
  if (!found.tokens?.rows.length) {
    const kinds = store.facts[name].kinds;
    const words = found.tokens === null ? [`This dump keeps no tokens. What it keeps of this sequence is there by SQL: `,
      kinds.map((kind) => [make("a", { href: link("sql", [], { q: `SELECT *\nFROM ${kind}\nWHERE dump = '${name.replaceAll("'", "''")}' AND sequence_id = ${row.sequence_id}` }) }, kind), " "])]
      : from >= row.length ? `This sequence has ${whole(row.length)} tokens, and no token ${whole(at ?? from)}.`
        : "Nothing is kept of these tokens.";
    return { title, body: [hero, make("p.notice", {}, words), counted(title, found.sequence, found.tokens)] };
  }
  const view = new TokenView(name, id, found, parameters.by, at, row.length);
  return { title, body: [hero, view.element], shown: () => view.shown() };
}

function neighbours(name, found) {
  const at = (id, text, rel) => id === null ? make("span") : make("a.button.plain", { href: link("sequence", [name, String(id)]), rel }, text);
  return make("nav.pager", { "aria-label": "Sequences beside this one" }, at(found.before, "← Before", "prev"), at(found.after, "After →", "next"));
}

class TokenView {
  constructor(name, id, found, by, at, length) {
    Object.assign(this, { name, id, found, length, chosen: null, turn: 0 });
    this.tokens = rows(found.tokens);
    this.measures = measures(found);
    this.measure = this.measures.find((measure) => measure.name === by) || this.measures[0];
    this.first = at;
    this.list = make("div.tokens", {
      role: "listbox", tabindex: "0", dir: "ltr", "aria-label": "Tokens of the sequence. Arrow keys go from one to the next.",
      onkeydown: (event) => this.key(event),
      onclick: (event) => {
        const token = event.target.closest("[role=option]");
        if (token) this.choose(Number(token.dataset.place));
      },
    });
    this.spans = this.tokens.map((token, place) => {
      const span = make("span.token", { role: "option", id: `token-${place}`, "aria-selected": "false", "data-place": place });
      span.textContent = shownToken(token.token_text);
      if (!token.is_target) span.classList.add("context");
      return span;
    });
    replace(this.list, this.spans);
    this.legend = make("div.legend");
    this.highest = make("div.highest");
    this.panel = positionPanel(() => this.choose(null));
    this.element = make("div.reading", {},
      make("section.card.text", {}, this.choices(), this.legend, this.list, this.windows(), this.highest,
        counted("What is shown of this sequence", found.sequence, found.tokens, found.saliency, ...Object.values(found.students))),
      this.panel.element);
    this.shade();
  }

  choices() {
    if (this.measures.length < 2) return null;
    return make("fieldset.shades", {}, make("legend", {}, "Shaded by"),
      this.measures.map((measure) => make("label", {},
        make("input", { type: "radio", name: "shade", value: measure.name, checked: measure === this.measure, onchange: () => {
          this.measure = measure;
          this.shade();
          this.rename();
        } }), make("span", {}, measure.title))));
  }

  // The parts of a sequence that is longer than what is shown at once.
  windows() {
    const { start, window: step } = this.found;
    if (this.length <= step) return null;
    const to = (from, text) => make("a.button.plain", { href: link("sequence", [this.name, this.id], { by: this.measure?.name, from: from || null }) }, text);
    return make("nav.pager", { "aria-label": "Parts of the sequence" },
      start > 0 ? to(Math.max(start - step, 0), "← Before") : make("span"),
      make("span.quiet", {}, `tokens ${whole(start)} to ${whole(Math.min(start + step, this.length) - 1)} of ${whole(this.length)}`),
      start + step < this.length ? to(start + step, "After →") : make("span"));
  }

  shade() {
    const measure = this.measure;
    if (!measure) return;
    const values = valuesOf(measure);
    this.list.dataset.shade = measure.name.startsWith("student-") ? "student" : measure.name;
    this.tokens.forEach((token, place) => {
      const value = values.get(token.position);
      const span = this.spans[place];
      span.style.setProperty("--part", String(Math.max(0, Math.min(1, (value ?? 0) / measure.most))));
      span.classList.toggle("unknown", value === undefined);
      const words = value === undefined ? "not kept" : `${measure.title} ${measure.form(value)}`;
      span.title = words;
      span.setAttribute("aria-label", `${spoken(token.token_text)}, position ${token.position}, ${words}`);
    });
    replace(this.legend, make("span", {}, "0"), make("span.scale", { "data-shade": this.list.dataset.shade, "aria-hidden": "true" }),
      make("span", {}, `${measure.form(measure.most)}${measure.most < 1 || measure.name === "tail" ? "" : " or more"}`), make("span.quiet", {}, measure.words));
    const top = this.tokens.map((token, place) => [values.get(token.position), place]).filter(([value]) => value !== undefined)
      .sort(([one], [other]) => other - one).slice(0, LISTED);
    replace(this.highest, make("h2", {}, `Most ${measure.title.toLowerCase() === "surprise" ? "surprising" : measure.title}`),
      make("p.chips", {}, top.map(([value, place]) => make("button.chip", { type: "button", onclick: () => this.choose(place) },
        quoted(this.tokens[place].token_text), make("span.quiet", {}, ` ${measure.form(value)}`)))));
  }

  shown() {
    const place = this.tokens.findIndex((token) => token.position === this.first);
    if (place >= 0) this.choose(place, false);
  }

  rename() {
    const at = this.chosen === null ? null : this.tokens[this.chosen].position;
    nameHere("sequence", [this.name, this.id], { by: this.measure === this.measures[0] ? null : this.measure.name, at, from: at === null ? this.found.start || null : null });
  }

  async choose(place, named = true) {
    if (this.chosen !== null) this.spans[this.chosen].setAttribute("aria-selected", "false");
    this.chosen = place;
    if (named) this.rename();
    if (place === null) {
      this.list.removeAttribute("aria-activedescendant");
      this.panel.clear();
      this.list.focus();
      return;
    }
    const span = this.spans[place];
    span.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", span.id);
    const mine = ++this.turn;
    const token = this.tokens[place];
    this.panel.wait(token); // on a phone it covers what is below: only now is it known where the token can be seen
    span.scrollIntoView({ block: "nearest" });
    try {
      const known = await get("position", { dump: this.name, id: this.id, position: token.position });
      if (mine === this.turn && this.chosen === place) this.panel.show(token, known);
    } catch (error) {
      if (mine === this.turn) this.panel.fail(error);
    }
  }

  key(event) {
    const last = this.tokens.length - 1;
    const here = this.chosen ?? -1;
    const moves = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + 10, ArrowUp: here - 10, Home: 0, End: last };
    if (event.key === "Escape" && this.chosen !== null) {
      event.preventDefault();
      this.choose(null);
    } else if (event.key in moves && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      this.choose(Math.max(0, Math.min(last, moves[event.key])));
    }
  }
}

function shownToken(text) {
  if (text === null || text === undefined) return "⟨?⟩";
  return visible(text).replaceAll("↵", "↵\n") || "∅"; // a token of no text
}

function spoken(text) {
  const words = visible(text ?? "");
  return words.trim() ? `“${words.trim()}”` : words.includes("↵") ? "line break" : words ? "space" : "token without text";
}
