// A statement that is run when somebody asks: its progress, a stop, and its answer.
import { answerOf, run, SignedOut } from "./api.js";
import { counted } from "./counted.js";
import { bytes, make, number, replace, say } from "./dom.js";
import { bars, table } from "./table.js";

let running = null;

// Stops what runs, as one leaves the page that asked it.
export function stopRunning() {
  running?.abort();
  running = null;
}

function progress(message) {
  if (message.waiting) return "Waiting for another statement to end…";
  const seconds = `${number(message.seconds || 0, 1)} s`;
  return message.of ? `${seconds} · read ${bytes(message.read)} of at most ${bytes(message.of)}` : `${seconds} · starting`;
}

// Where a statement's answer comes. `start(sql)` runs it; `show(sql)` shows what it answered before, if it did.
export function statementArea({ dumps, title, picture = [], none = "No row: nothing meets this." }) {
  const area = make("div.outcome", { "aria-busy": "false", tabindex: "-1" });

  function present(answer) {
    area.setAttribute("aria-busy", "false");
    replace(area,
      answer.rows.length ? null : make("p.notice", {}, none),
      picture.length ? bars(answer, picture) : null,
      answer.rows.length ? table(answer, dumps, title) : null,
      answer.remark ? make("p.notice", {}, answer.remark) : null,
      make("p.quiet", {}, `Answered in ${number(answer.seconds, 2)} s. `, counted(title || "this answer", answer)));
    if (!answer.rows.length) say(none);
  }

  async function start(sql) {
    stopRunning();
    const control = new AbortController();
    running = control;
    const line = make("p.quiet", {}, "Starting…");
    const gauge = make("progress", { max: "1", "aria-label": "Share of the files that was read" });
    const stop = make("button.plain", { type: "button", onclick: () => {
      control.abort();
      area.focus(); // which the button had, that is gone now
    } }, "Stop");
    area.setAttribute("aria-busy", "true");
    replace(area, make("div.progress", {}, gauge, line, stop));
    say("The statement runs");
    try {
      const answer = await run(sql, (message) => {
        if (message.of) gauge.value = message.read / message.of;
        if (message.waiting || message.seconds !== undefined) line.textContent = progress(message);
      }, control.signal);
      if (running === control) present(answer);
    } catch (error) {
      if (running !== control) return; // another one runs here, or another page is shown
      area.setAttribute("aria-busy", "false");
      if (error.name === "AbortError") {
        replace(area, make("p.notice", {}, "Stopped."));
        say("Stopped");
        return;
      }
      if (error instanceof SignedOut) {
        location.reload();
        return;
      }
      replace(area, make("p.notice.bad", { role: "alert" }, error.message));
    } finally {
      if (running === control) running = null;
    }
  }

  function show(sql) {
    const answer = answerOf(sql);
    if (answer) present(answer);
    return Boolean(answer);
  }

  // What is asked has changed: an answer to something else would stand below it.
  function clear() {
    stopRunning();
    replace(area);
  }

  return { area, start, show, clear };
}
