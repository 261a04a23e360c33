// Questions that the page brings along, and the search, which are two of them.
import { get } from "./api.js";
import { make } from "./dom.js";
import { link, rename } from "./places.js";
import { statementArea } from "./statement.js";

const SEARCHES = ["text", "value"];
// Why an answer has no row, where that is not plain.
const NONE = {
  student: "No row: the student's file is of another dump.",
  "student-documents": "No row: the student's file is of another dump.",
  teachers: "No row: these two dumps have no sequence of the same tokens.",
  garbled: "No row: no document has as many targets.",
};

function select(id, label, values, chosen, onchange) {
  return make("div.field", {}, make("label", { for: id }, label),
    make("select", { id, onchange }, values.map(([value, text]) => make("option", { value, selected: value === chosen }, text))));
}

// Which dumps a question can be asked of.
function askable(store, name) {
  const needs = store.questions[name].needs;
  return Object.entries(store.facts)
    .filter(([, facts]) => (!needs.includes("positions") || facts.kinds.includes("positions")) && (!needs.includes("column") || facts.columns.length))
    .map(([dump]) => dump);
}

function possible(store, name) {
  const needs = store.questions[name].needs;
  return askable(store, name).length > (needs.includes("dumps") ? 1 : 0) && (!needs.includes("student") || Object.keys(store.students).length > 0);
}

export function questionsPage(store, { parameters }) {
  const names = Object.keys(store.questions).filter((name) => !SEARCHES.includes(name));
  const open = names.filter((name) => possible(store, name));
  return {
    title: "Questions",
    body: [
      make("div.hero", {}, make("h1", {}, "Questions"),
        make("p.quiet", {}, "Each is one SQL statement, which you can change. It reads the whole dump, and can be stopped.")),
      make("div.cards.questions", {}, open.map((name) =>
        make("a.card.question", { href: link("ask", [name], { dump: parameters.dump }) },
          make("b", {}, store.questions[name].title), make("span.quiet", {}, store.questions[name].words)))),
      Object.keys(store.students).length ? null : make("p.notice", {},
        "To see where a student differs, keep what it makes of each position and open the store with it: ",
        make("code", {}, "student-train evaluate STORE --model MODEL --keep-positions q.parquet"), ", then ",
        make("code", {}, "knowledge-store browse STORE --with student=q.parquet"), "."),
    ],
  };
}

// The controls of a question, which say what it is about, and its answer.
function asking(store, name, parameters, moved, view, path) {
  const question = store.questions[name];
  const dumps = askable(store, name);
  // A student was judged on one dump: that is asked first.
  const judged = question.needs.includes("student") ? Object.values(store.students)[0].dump : null;
  const first = [parameters.dump, judged, dumps[0]].find((dump) => dumps.includes(dump));
  const asked = { dump: first, column: parameters.column, other: parameters.other, text: parameters.text || "" };
  const needs = (need) => question.needs.includes(need);
  const outcome = statementArea({
    dumps: Object.keys(store.facts), title: question.title,
    picture: question.picture.length ? [question.picture[0] || asked.column || "", ...question.picture.slice(1)] : [],
    none: NONE[name],
  });
  const controls = make("div.row");
  const sqlLink = make("a", { href: "#/sql" }, "Change it in the SQL box");

  function settle() {
    const facts = store.facts[asked.dump];
    if (needs("column")) asked.column = facts.columns.includes(asked.column) ? asked.column : facts.columns[0];
    const others = needs("student") ? Object.keys(store.students) : needs("dumps") ? dumps.filter((dump) => dump !== asked.dump) : [];
    asked.other = others.includes(asked.other) ? asked.other : others[0];
    const again = (field) => (event) => {
      asked[field] = event.target.value;
      outcome.clear();
      settle();
      document.getElementById(event.target.id)?.focus();
    };
    const text = make("input", { type: "search", id: "ask-text", value: asked.text, required: true, autocomplete: "off",
      oninput: (event) => { asked.text = event.target.value; } });
    controls.replaceChildren(
      select("ask-dump", "Dump", dumps.map((dump) => [dump, dump]), asked.dump, again("dump")),
      ...(needs("column") ? [select("ask-column", "Column", facts.columns.map((column) => [column, column]), asked.column, again("column"))] : []),
      ...(needs("student") ? [select("ask-other", "Student", others.map((other) => [other, other]), asked.other, again("other"))] : []),
      ...(needs("dumps") ? [select("ask-other", "Other dump", others.map((other) => [other, other]), asked.other, again("other"))] : []),
      ...(needs("text") ? [make("div.field.grow", {}, make("label", { for: "ask-text" }, "Text"), text)] : []),
      make("button", { type: "submit" }, needs("text") ? "Search" : "Ask"));
  }

  const named = () => Object.fromEntries(Object.entries(asked).filter(([field, value]) => value && (field === "dump" || needs(field) || (field === "other" && (needs("student") || needs("dumps"))))));
  const statement = async () => {
    const { sql } = await get("question", { name, ...named() });
    sqlLink.setAttribute("href", link("sql", [], { q: sql }));
    return sql;
  };
  async function submit(event) {
    event?.preventDefault();
    rename(view, path, { ...named(), in: view === "search" && name !== "text" ? name : null });
    try {
      await outcome.start(await statement());
    } catch (error) {
      outcome.area.replaceChildren(make("p.notice.bad", { role: "alert" }, error.message));
    }
  }
  settle();
  const ready = !needs("text") || asked.text;
  return {
    body: [make("form.card", { onsubmit: submit }, controls), make("p.quiet", {}, sqlLink), outcome.area],
    // Coming back shows the answer there was. Somebody who followed a link on this page has asked; an address alone has not.
    shown: async () => {
      if (!ready) return;
      const sql = await statement();
      if (!outcome.show(sql) && moved) await submit();
    },
  };
}

export function askPage(store, { path: [name], parameters, moved }) {
  if (!Object.hasOwn(store.questions, name)) throw new Error(`The page asks no question ${JSON.stringify(name)}.`);
  const question = store.questions[name];
  if (!possible(store, name)) throw new Error(`${question.title} Nothing in this store can answer that.`);
  const { body, shown } = asking(store, name, parameters, moved, "ask", [name]);
  return {
    title: question.title,
    body: [
      make("div.hero", {},
        make("p.trail", {}, make("a", { href: link("ask", [], { dump: parameters.dump }) }, "Questions")),
        make("h1", {}, question.title), make("p.quiet", {}, question.words)),
      body,
    ],
    shown,
  };
}

export function searchPage(store, { parameters, moved }) {
  const names = SEARCHES.filter((name) => possible(store, name));
  if (!names.length) throw new Error("Nothing in this store can be searched.");
  const name = names.includes(parameters.in) ? parameters.in : names[0];
  const labels = { text: "In the text", value: "In a column" };
  const { body, shown } = asking(store, name, parameters, moved, "search", []);
  return {
    title: "Search",
    body: [
      make("div.hero", {}, make("h1", {}, "Search"), make("p.quiet", {}, store.questions[name].words, " For anything else there is ", make("a", { href: "#/sql" }, "SQL"), "."),
        make("p.chips", { role: "group", "aria-label": "Where to search" }, names.map((other) =>
          make("a.chip", { href: link("search", [], { dump: parameters.dump, in: other }), "aria-current": other === name ? "true" : null }, labels[other])))),
      body,
    ],
    shown,
  };
}
