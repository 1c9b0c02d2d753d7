// The server, as the page asks it. The key lives in this module's memory and nowhere else.

const ROOT = new URL("../", import.meta.url);
let key = "";

export const hasKey = () => key !== "";
export const setKey = (value) => {
  key = value.trim();
};

export class ApiError extends Error {
  constructor(status, words, retryAfterS) {
    super(words);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

// A header holds bytes, which JavaScript wants as characters up to U+00FF: those of the key in UTF-8.
const bytesOf = (text) => Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");

const headers = () => (key ? { Authorization: `Bearer ${bytesOf(key)}` } : {});

const wordsOf = (content, status) => {
  const detail = content?.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return detail.map((one) => one.msg).join("; ");
  return `The server answered ${status}.`;
};

// → {content, id}: the JSON of the answer and the id by which it can be corrected.
export async function request(path, body, { keepalive = false } = {}) {
  let response;
  try {
    response = await fetch(new URL(path, ROOT), {
      method: body === undefined ? "GET" : "POST",
      keepalive,
      headers: { ...headers(), Accept: "application/json", ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, "The server cannot be reached.");
  }
  const content = await response.json().catch(() => null);
  if (!response.ok) {
    throw new ApiError(response.status, wordsOf(content, response.status), Number(response.headers.get("Retry-After")) || 1);
  }
  return { content, id: response.headers.get("X-Request-Id") };
}

export const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

// As `request`, but while the server is overloaded it waits as long as that says, and tells `waiting` each second.
export async function patient(path, body, waiting = () => {}, { attempts = 5, keepalive = false } = {}) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await request(path, body, { keepalive });
    } catch (error) {
      if (error.status !== 429 || attempt >= attempts) throw error;
      for (let left = error.retryAfterS; left > 0; left--) {
        waiting(left);
        await sleep(1);
      }
    }
  }
}

let stream = null;

// Calls `onEvent` with each state of the server, and `onLost` with the error while there is none. It never ends; a new
// call replaces the one before, as is wanted when the key has changed. A hidden page does not follow: a browser has only
// six connections to one server, for all its tabs.
export async function follow(onEvent, onLost) {
  stream?.abort();
  const mine = (stream = new AbortController());
  for (let pause = 1; !mine.signal.aborted; pause = Math.min(10, pause * 2)) {
    await shown();
    if (mine.signal.aborted) return;
    const one = new AbortController();
    const end = () => (document.hidden || mine.signal.aborted) && one.abort();
    document.addEventListener("visibilitychange", end);
    mine.signal.addEventListener("abort", end);
    try {
      for await (const event of events(one.signal)) {
        pause = 0.5;
        try {
          onEvent(event);
        } catch (error) {
          reportError(error); // the page's own fault, and none of the connection's
        }
      }
      throw new ApiError(0, "The server has ended the connection.");
    } catch (error) {
      if (mine.signal.aborted) return;
      if (!one.signal.aborted) {
        onLost(error instanceof ApiError ? error : new ApiError(0, "The server cannot be reached."));
        await sleep(pause);
      }
    } finally {
      one.abort();
      document.removeEventListener("visibilitychange", end);
      mine.signal.removeEventListener("abort", end);
    }
  }
}

const shown = () =>
  new Promise((resolve) => {
    const look = () => {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    look();
  });

async function* events(signal) {
  const response = await fetch(new URL("events", ROOT), { headers: headers(), signal });
  if (!response.ok) throw new ApiError(response.status, wordsOf(await response.json().catch(() => null), response.status));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data:")) yield JSON.parse(part.slice(5));
  }
}
