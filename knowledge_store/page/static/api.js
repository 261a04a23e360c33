// The server's answers.

export class Refused extends Error {}
export class SignedOut extends Error {}

async function checked(response) {
  if (response.ok) return response;
  let sentence = `the server answered with ${response.status}`;
  try {
    sentence = (await response.json()).error || sentence;
  } catch {
    // it says no more
  }
  throw response.status === 401 ? new SignedOut(sentence) : new Refused(sentence);
}

async function reached(address, options) {
  try {
    return await fetch(address, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server does not answer: is `knowledge-store browse` still running?");
  }
}

export async function get(path, parameters = {}, signal = undefined) {
  const query = new URLSearchParams(parameters);
  return (await checked(await reached(`/api/${path}?${query}`, { signal }))).json();
}

function post(path, body, signal = undefined) {
  return reached(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

export async function signIn(token) {
  await checked(await post("/sign-in", { token }));
}

// Answers to statements that were run, the last ones: going back shows them again.
const kept = new Map();
const KEPT = 20;

export function answerOf(sql) {
  return kept.get(sql) || null;
}

// Runs a statement in a process of its own. `hear` gets {waiting, seconds, read, of} now and then; `signal` stops it.
export async function run(sql, hear, signal) {
  const response = await checked(await post("/api/sql", { sql }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value || "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const message = JSON.parse(line);
      if (message.error) throw new Refused(message.error);
      if (message.answer) {
        const answer = { ...message.answer, sql, seconds: message.seconds };
        kept.delete(sql);
        kept.set(sql, answer);
        if (kept.size > KEPT) kept.delete(kept.keys().next().value);
        return answer;
      }
      hear(message);
    }
    if (done) throw new Refused("the server ended before it had answered");
  }
}
