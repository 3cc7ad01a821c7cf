// Asking the server: the key, errors, streams of server-sent events. Knows no element but what asks for the key.

const KEY = "turboserve.key"; // in sessionStorage: the tab's own, gone with it

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

let askForKey = null; // (wasWrong) => Promise<string>, set by the page
let asking = null; // one question at a time, however many requests were refused

export function useKeyQuestion(question) {
  askForKey = question;
}

/** Asked for before the first request, so that none has to be refused first. */
let firstKey = null;

async function askFirst() {
  const { is_needed: isNeeded } = await (await fetch(new URL("dashboard/key.json", document.baseURI))).json();
  if (isNeeded && !hasKey()) await newKey(null);
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

async function newKey(refused) {
  const known = sessionStorage.getItem(KEY);
  if (known !== refused) return; // another request has asked meanwhile
  asking ??= askForKey(refused !== null).finally(() => (asking = null));
  sessionStorage.setItem(KEY, await asking);
}

/** A reply with a good status; asks for the key where one is wanted. Raises ApiError. */
export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  firstKey ??= askFirst().catch(() => {}); // a server that cannot be reached says so to the request itself
  await firstKey;
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const all = { ...headers };
    if (key !== null) all.Authorization = `Bearer ${key}`;
    if (method === "POST") all["Content-Type"] = "application/json";
    let reply;
    try {
      reply = await fetch(new URL(path, document.baseURI), {
        method, headers: all, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached.", 0, "unreachable");
    }
    if (reply.ok) return reply;
    const error = await errorOf(reply);
    if (reply.status !== 401) throw error;
    await newKey(key);
  }
}

export const askJson = async (path, options) => (await ask(path, options)).json();

async function errorOf(reply) {
  try {
    const { error } = await reply.json();
    return new ApiError(error.message, reply.status, error.code);
  } catch {
    return new ApiError(`The server answered ${reply.status}.`, reply.status, null);
  }
}

/** The `data:` payloads of a stream of server-sent events; comments and other fields are skipped. */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early, as after [DONE], closes the connection
  }
}

/** Chunks of a chat completion. Raises ApiError, also for an error that ends the stream, or one that is cut off. */
export async function* chatChunks(body, sessionId, signal) {
  const reply = await ask("v1/chat/completions", { method: "POST", body, signal, headers: { "X-Session-Id": sessionId } });
  for await (const data of eventData(reply.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 200, chunk.error.code);
    yield chunk;
  }
  throw new ApiError("The answer was cut off: the connection ended.", 0, "cut_off");
}
