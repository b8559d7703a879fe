// Requests to the server that this page came from.

/** A failure, in a sentence for the user. `status`: of HTTP, 0 without a response. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const MAX_TOKENS = 1024; // about 60 points; the user can stop an answer before

const LOST = "The connection to the server was lost before the answer was complete.";
const NO_SERVER = "The server does not answer. Check that molmo-edge serve still runs, then try again.";

/** The state of the server: {model, status}. */
export async function health() {
  const response = await fetch("health", { cache: "no-store" });
  return response.json();
}

/**
 * Yields the parts of an answer: {content}, {points} without their labels and, at the end, {all, count, cut}: all
 * points with their labels, the number that the answer states, and whether the answer was cut off.
 * Throws Failure, and AbortError after `signal`.
 */
export async function* chat(question, image, key, signal) {
  const content = [{ type: "text", text: question }];
  if (image) content.push({ type: "image_url", image_url: { url: image } });
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = JSON.stringify({ messages: [{ role: "user", content }], max_tokens: MAX_TOKENS, stream: true });
  let response;
  try {
    response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure(NO_SERVER);
  }
  if (!response.ok) throw new Failure(await explain(response), response.status);
  let finished = false;
  for await (const data of events(response.body.getReader())) {
    if (data === "[DONE]") {
      finished = true;
      break;
    }
    const event = JSON.parse(data);
    if (event.error) throw new Failure(sentence(event.error.message), 500);
    const [choice] = event.choices;
    if (!choice) continue;
    yield choice.delta;
    if (choice.finish_reason) {
      yield { all: choice.points ?? [], count: choice.count, cut: choice.finish_reason === "length" };
    }
  }
  if (!finished) throw new Failure(LOST);
}

/** The data of server-sent events. */
async function* events(reader) {
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : new Failure(LOST);
      }
      if (part.done) return;
      held += decoder.decode(part.value, { stream: true });
      const blocks = held.split("\n\n");
      held = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function explain(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // a proxy in front of the server may answer with HTML
  }
  switch (response.status) {
    case 401:
      return "The server needs a key.";
    case 413:
      return message ? `The photo is too large: ${message}.` : "The photo is too large for this server.";
    case 429: {
      const wait = Number(response.headers.get("Retry-After"));
      return `The server is busy with other questions. Try again${wait ? ` in about ${wait} s` : " later"}.`;
    }
    case 503:
      return "The server is stopping. Start it again, then try again.";
    case 504:
      return "The answer took longer than this server allows.";
    default:
      return message ? sentence(message) : `The server answered with status ${response.status}.`;
  }
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.?!]$/.test(message) ? "" : ".");
}
