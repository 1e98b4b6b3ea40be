// What the page asks of the endpoint: which models there are, and answers as they grow. Knows no element of the page.

const KEY = "rayswift.key"; // in sessionStorage: gone when the tab is closed

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer of the endpoint that is an error, in its own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** What this key may chat with, as {model, version, rayswift}; a version of null is the live one. Throws Refusal. */
export async function choices() {
  const found = await (await ask("v1/models")).json();
  return found.data.filter(({ task }) => task !== "embed").flatMap(offered);
}

/** A model as it is live, and the other versions of it that are served, as `rayswift.versions` lists them. */
function offered({ id, rayswift = null }) {
  const others = (rayswift?.versions ?? []).filter((one) => one.version !== rayswift.version);
  return [
    { model: id, version: null, rayswift },
    ...others.map((one) => ({ model: id, version: one.version, rayswift: one })),
  ];
}

/** The chunks of a streamed chat completion, in order. Throws Refusal; aborting `signal` ends it with an AbortError. */
export async function* chunks(choice, messages, settings, signal) {
  const body = { model: choice.model, messages, ...settings, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      ...(choice.version ? { "X-RaySwift-Version": choice.version } : {}),
    },
    body: JSON.stringify(body),
    signal,
  });
  for await (const event of events(response.body)) {
    if (event === "[DONE]") return;
    const chunk = JSON.parse(event);
    if (chunk.error) throw new Refusal(response.status, chunk.error.message);
    yield chunk;
  }
  throw new Refusal(response.status, "the answer broke off");
}

async function ask(path, { headers = {}, ...options } = {}) {
  const authorization = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization }, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the endpoint does not answer");
  }
  if (!response.ok) throw new Refusal(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const told = (await response.json().catch(() => null))?.error?.message ?? `the endpoint answers ${response.status}`;
  const wait = response.headers.get("Retry-After");
  return wait && response.status === 429 ? `${told} (after ${wait} s)` : told;
}

/** The data of each server-sent event; all of ours are one line. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
