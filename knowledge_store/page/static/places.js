// What one looks at, as the address names it: "#/sequence/train/65536?by=tail&at=17".

export function link(view, path = [], parameters = {}) {
  const parts = ["#", view, ...path].filter((part) => part !== "").map((part, place) => (place ? encodeURIComponent(part) : part));
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  return parts.join("/") + (view === "" ? "/" : "") + (query.size ? `?${query}` : "");
}

export function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const parts = path.split("/").map(decoded);
  return { view: parts[0], path: parts.slice(1), parameters: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // an address that was cut off
  }
}

// Names another place without going there: nothing is loaded, and "back" goes where it did before.
export function rename(view, path, parameters) {
  history.replaceState(history.state, "", link(view, path, parameters));
}
