// Requests to the server that this page came from.

const KEY = "quire.key";

/** The server's answer to a request that failed, in its own words. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => null;
let asking = null;

/** `ask(refused)`, true after a key that the server does not know, resolves to a key or to null. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

/** Whether requests are sent with an API key. */
export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY));
}

/**
 * Like fetch, with the API key if one was given. A server that answers 401 makes the page ask for
 * the key, once for all requests that wait. Throws ApiError for every status but 2xx.
 */
export async function request(path, options = {}) {
  const used = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(used && { Authorization: `Bearer ${used}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401 && !options.background) {
    if (sessionStorage.getItem(KEY) !== used) return request(path, options);
    asking ??= askForKey(Boolean(used)).finally(() => (asking = null));
    const key = await asking;
    if (key) {
      sessionStorage.setItem(KEY, key);
      return request(path, options);
    }
  }
  throw new ApiError(await reason(response), response.status);
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** The chunks of one chat completion. Throws ApiError for an error that arrives in the stream. */
export async function* chatChunks(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: STREAM_OPTIONS }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
}

// Usage on every chunk: the count of tokens while they come.
const STREAM_OPTIONS = { include_usage: true, continuous_usage_stats: true };

/** The data of each server-sent event; comments, names and ids are dropped. */
async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\r|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // The connection may be gone already.
  }
}
