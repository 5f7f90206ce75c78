// The server, as this page asks it. Addresses are relative, so that a proxy may put it under any path.

import { tab } from "./storage.js";

const KEY = "handful.key";

/** What the server refused, or that it could not be asked. `status` is 0 then. */
export class ServerError extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const setKey = (key) => tab.set(KEY, key);
export const hasKey = () => tab.get(KEY) !== null;

async function ask(path, body, signal) {
  const key = tab.get(KEY);
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new ServerError(said?.error?.message ?? `The server answered ${answer.status}.`, answer.status, said?.error?.param);
}

export const getJson = async (path, signal) => (await ask(path, null, signal)).json();
export const postJson = async (path, body, signal) => (await ask(path, body, signal)).json();

/** The events of a stream, as JSON, up to [DONE]. ServerError for one that ends in an error, or that breaks off. */
export async function* events(path, body, signal) {
  const answer = await ask(path, { ...body, stream: true }, signal);
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += decoder.decode(value, { stream: true });
      const whole = rest.split("\n\n");
      rest = whole.pop();
      for (const event of whole) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue; // a comment, which keeps the connection
        const made = JSON.parse(data);
        if (made.error) throw new ServerError(made.error.message, 500, made.error.param);
        yield made;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The answer broke off: the connection is gone.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ServerError("The answer broke off: the connection is gone.");
}
