// The questions behind "Point" and "Count", as molmo_edge/frontend/prompts.py writes them: the model was trained on
// these. tests/test_page.py compares the two.

const ARTICLES = new Set(["the", "a", "an"]);
const DETERMINERS = new Set(
  ("all any both each either every her his its my our some that their these this those your").split(" "),
);

/** The text that the model gets; "" if `text` names nothing. */
export function question(mode, text) {
  if (mode === "caption") return "Describe this image.";
  const line = text.trim().split(/\s+/).join(" ");
  if (mode === "ask") return line;
  const phrase = line.replace(/[.?!,;: ]+$/, "");
  if (!phrase) return "";
  const [first, ...others] = phrase.split(" ");
  const rest = others.join(" ");
  const article = ARTICLES.has(first.toLowerCase()) && rest;
  if (mode === "count") return `How many ${article ? rest : phrase} are there?`;
  if (article) return `Point to the ${rest}.`;
  return DETERMINERS.has(first.toLowerCase()) && rest ? `Point to ${phrase}.` : `Point to the ${phrase}.`;
}

const TAG = /<(?:points?|tracks) [^<]*?"\s*\/?>|<\/(?:points?|tracks)>/g;
const BEGINNINGS = ["<point ", "<points ", "<tracks ", "</point>", "</points>", "</tracks>"];

/** An answer without its point tags; while it streams, also without the beginning of one at its end. */
export function readable(text, complete) {
  const shown = text.replace(TAG, "");
  const start = shown.lastIndexOf("<");
  if (complete || start < 0) return complete ? shown.trim() : shown;
  const end = shown.slice(start);
  return BEGINNINGS.some((tag) => tag.startsWith(end) || (tag.endsWith(" ") && end.startsWith(tag)))
    ? shown.slice(0, start)
    : shown;
}
