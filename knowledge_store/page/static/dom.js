// Elements made of plain text: nothing that comes from a store is ever read as HTML.

// An element: make("a.link", {href: "#/"}, "text", child). Attributes that begin with "on" are listeners; null ones are left out.
export function make(kind, attributes = {}, ...children) {
  const [name, ...classes] = kind.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  return finish(element, attributes, children);
}

// The same of SVG.
export function draw(name, attributes = {}, ...children) {
  return finish(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function finish(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function replace(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

// Says something to people who do not see the page.
export function say(text) {
  document.getElementById("said").textContent = text;
}

const PICTURES = 0x2400; // of the control characters, in order
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udfff](?![\udc00-\udfff])/gu;

// Text that shows what it is made of: what is no sign of its own, or would turn the text around it, is spelled out.
export function visible(text) {
  return String(text).replace(UNSEEN, (character) => {
    const code = character.codePointAt(0);
    if (code === 0x0a) return "↵";
    if (code === 0x09) return "⇥";
    if (code < 0x20) return String.fromCodePoint(PICTURES + code);
    return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// Text of a store, isolated from the direction of what stands around it.
export function quoted(text, kind = "bdi.token-text") {
  return make(kind, {}, text === null || text === undefined ? "–" : visible(text).replace(/^ | $/g, "␣"));
}

export function whole(number) {
  return typeof number === "number" ? number.toLocaleString("en") : String(number ?? "–");
}

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return whole(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 10 ** -digits || size >= 1e9)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: size >= 100 ? 1 : digits });
}

export function share(value, digits = 1) {
  if (typeof value !== "number") return "–";
  if (value > 0 && value < 0.0005) return "<0.1 %";
  return `${(100 * value).toFixed(value >= 0.9995 ? 0 : digits)} %`;
}

export function bytes(value) {
  if (typeof value !== "number") return "–";
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let place = 0;
  let left = value;
  while (left >= 1000 && place < units.length - 1) [left, place] = [left / 1000, place + 1];
  return `${place ? left.toPrecision(3) : left} ${units[place]}`;
}

// The first of some elements, and the others behind a line that opens them.
export function folded(elements, first, words) {
  if (elements.length <= first) return elements;
  return [elements.slice(0, first), make("details", {}, make("summary", {}, `${whole(elements.length - first)} more ${words}`), elements.slice(first))];
}

// The rows of an answer as objects.
export function rows(answer) {
  if (!answer) return [];
  return answer.rows.map((row) => Object.fromEntries(answer.columns.map((column, place) => [column.name, row[place]])));
}
