// "How was this counted?": the statement behind what is shown.
import { make, number } from "./dom.js";
import { link } from "./places.js";

let dialog = null;

function show(title, answers) {
  dialog?.remove();
  const parts = answers.map((answer) =>
    make("section", {},
      make("pre", { tabindex: "0", "aria-label": "SQL" }, answer.sql),
      make("p.quiet", {}, `${number(answer.rows.length)} ${answer.rows.length === 1 ? "row" : "rows"} in ${number(answer.seconds)} s. `,
        make("a", { href: link("sql", [], { q: answer.sql }), onclick: () => dialog.close() }, "Open in the SQL box"))));
  dialog = make("dialog", { "aria-label": `How ${title} was counted` },
    make("form", { method: "dialog" },
      make("h2", {}, "How was this counted?"),
      make("p.quiet", {}, `${title}: the answer to ${answers.length === 1 ? "this statement" : "these statements"}.`),
      ...parts,
      make("p.buttons", {}, make("button.plain", { type: "button", onclick: () => dialog.close() }, "Close"))));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}

// A button that shows the statements of some answers.
export function counted(title, ...answers) {
  const known = answers.filter(Boolean);
  if (!known.length) return null;
  return make("button.counted", {
    type: "button",
    "aria-label": `How was this counted? ${title}`,
    onclick: () => show(title, known),
  }, "How was this counted?");
}
