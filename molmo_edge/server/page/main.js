// The page: a photo, questions about it, and answers with points on the photo.

import { AnswerCard, addMark, placeMark } from "./answer.js";
import { chat, health } from "./api.js";
import { hasCamera, imageIn, readPicture, startCamera, takePhoto } from "./picture.js";
import { question } from "./questions.js";

const $ = (id) => document.getElementById(id);
const MODES = {
  ask: { label: "Question about the photo", example: "What is on the table?", button: "Ask" },
  point: { label: "What to point to", example: "the cup", button: "Point" },
  count: { label: "What to count", example: "cups", button: "Count" },
  caption: { label: "", example: "", button: "Describe" },
};
const KEY = "molmo-edge-key"; // in sessionStorage

let picture = null;
let running = null; // AbortController of the current answer
let shown = null; // the card whose points are on the photo
let last = null; // [mode, text] of the last question, for "Try again"

const mode = () => new FormData($("form")).get("mode");

// Photo

async function usePicture(blob) {
  stop();
  $("status").textContent = "Reading the photo…";
  try {
    const next = await readPicture(blob);
    if (picture) URL.revokeObjectURL(picture.url);
    picture = next;
  } catch (error) {
    fail(error.message, false);
    return;
  } finally {
    $("status").textContent = "";
  }
  $("error").hidden = true;
  $("photo").src = picture.url;
  $("photo").alt = `Your photo, ${picture.width} by ${picture.height} pixels`;
  $("frame").hidden = false;
  $("empty").hidden = true;
  $("stage").classList.add("filled");
  $("choose").textContent = "Another photo";
  $("choose").classList.remove("primary");
  const [width, height] = picture.sent;
  const reduced = width !== picture.width;
  const size = `${picture.width} × ${picture.height} pixels`;
  $("size").textContent = reduced ? `${size}, sent as ${width} × ${height}` : size;
  $("size").hidden = false;
  $("answers").replaceChildren();
  show(null);
  if (mode() !== "caption") $("question").focus({ preventScroll: true });
}

for (const id of ["file", "capture"]) {
  $(id).addEventListener("change", () => {
    const [file] = $(id).files;
    $(id).value = ""; // so that the same file can be chosen again
    if (file) usePicture(file);
  });
}
$("choose").addEventListener("click", () => $("file").click());
document.addEventListener("paste", (event) => {
  const file = imageIn(event.clipboardData);
  if (file) {
    event.preventDefault();
    usePicture(file);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("stage").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  const file = imageIn(event.dataTransfer);
  if (file) usePicture(file);
  else fail("That is not an image file. Drop a JPEG, PNG or WebP file.", false);
});

let endCamera = () => {};
$("camera").addEventListener("click", async () => {
  if (!hasCamera()) {
    $("capture").click(); // a phone opens its camera, other machines a file
    return;
  }
  try {
    endCamera = await startCamera($("video"));
    $("camera-dialog").showModal();
  } catch (error) {
    const denied = error.name === "NotAllowedError";
    fail(denied ? "The browser does not allow this page to use the camera." : "No camera was found.", false);
  }
});
$("take").addEventListener("click", async () => {
  const photo = await takePhoto($("video"));
  $("camera-dialog").close();
  usePicture(photo);
});
$("camera-cancel").addEventListener("click", () => $("camera-dialog").close());
$("camera-dialog").addEventListener("close", () => endCamera());

// Question

function useMode() {
  const { label, example, button } = MODES[mode()];
  $("text-row").hidden = mode() === "caption";
  $("question-label").textContent = label;
  $("question").placeholder = example;
  $("send").textContent = button;
}
for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", useMode);

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) ask(mode(), $("question").value);
});
$("stop").addEventListener("click", stop);
$("retry").addEventListener("click", () => last && !running && ask(...last));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});

function stop() {
  running?.abort();
}

async function ask(kind, text) {
  $("error").hidden = true;
  const asked = question(kind, text);
  if (!picture) {
    fail("Choose a photo first.", false);
    $("choose").focus();
    return;
  }
  if (!asked) {
    fail(kind === "ask" ? "Write a question first." : `Write ${MODES[kind].label.toLowerCase()} first.`, false);
    $("question").focus();
    return;
  }
  last = [kind, text];
  const control = (running = new AbortController());
  const card = new AnswerCard(asked, picture, kind, show);
  $("answers").prepend(card.root);
  show(card);
  working(true);
  $("status").textContent = "Looking at the photo…";
  let key = sessionStorage.getItem(KEY);
  let note = "";
  try {
    for await (const part of chat(asked, picture.data, key, control.signal)) {
      if (control.signal.aborted) break;
      if (part.content) card.addText(part.content);
      for (const point of part.points ?? []) addPoint(card, point);
      if (part.all) card.setPoints(part.all);
      if (part.all && shown === card) placeMarks(card);
      if (part.count !== undefined && part.count !== null) card.setCount(part.count);
      if (part.cut) note = "The answer was cut off at the limit on its length.";
      if (part.content || part.points) $("status").textContent = "Answering…";
    }
    if (control.signal.aborted) note = "You stopped this answer.";
  } catch (error) {
    if (error.name === "AbortError") {
      note = "You stopped this answer.";
    } else {
      working(false);
      if (!card.raw && !card.points.length) {
        card.root.remove();
        show(null);
      } else {
        card.finish("This answer is not complete.");
      }
      if (error.status === 401) askForKey(key);
      else fail(error.message ?? String(error), true);
      return;
    }
  }
  working(false);
  card.finish(note);
  if (card.root.isConnected) $("announced").textContent = note ? `${card.spoken} ${note}` : card.spoken;
}

function working(on) {
  if (!on) running = null;
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("answers").setAttribute("aria-busy", String(on));
  if (on) $("announced").textContent = "";
  else $("status").textContent = "";
  // The button that had the focus is gone.
  if (document.activeElement === document.body) (on ? $("stop") : $("send")).focus({ preventScroll: true });
}

// Answer

function addPoint(card, point) {
  card.addPoint(point);
  if (shown === card) addMark($("marks"), point, card.points.length);
}

/** Show the points of `card` on the photo, and of no other. */
function show(card) {
  if (shown?.points.length) shown.showButton.hidden = false;
  shown?.root.classList.remove("shown");
  shown = card;
  $("marks").replaceChildren();
  if (!card) return;
  card.root.classList.add("shown");
  card.showButton.hidden = true;
  placeMarks(card);
}

/** Put all marks of `card` on the photo; those that are there in the right place stay, so that they appear once. */
function placeMarks(card) {
  const there = [...$("marks").children];
  for (const mark of there.slice(card.points.length)) mark.remove();
  card.points.forEach((point, i) => {
    if (there[i]) placeMark(there[i], point);
    else addMark($("marks"), point, i + 1);
  });
}

// The mark of the point that the pointer or the focus is on stands out.
for (const [type, on] of [["pointerover", true], ["pointerout", false], ["focusin", true], ["focusout", false]]) {
  $("answers").addEventListener(type, (event) => {
    const item = event.target.closest("li");
    if (!item || !shown?.root.contains(item)) return;
    $("marks").querySelector(`[data-number="${item.dataset.number}"]`)?.classList.toggle("strong", on);
  });
}

// Errors and the key

function fail(message, again) {
  $("error-text").textContent = message;
  $("retry").hidden = !again;
  $("error").hidden = false;
}

function askForKey(wrong) {
  $("key-text").textContent = wrong
    ? "The server does not accept this key. Enter the key that the server was started with."
    : "Enter the key that the server was started with. This tab keeps it until you close it.";
  $("key").value = "";
  $("key-dialog").showModal();
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key-dialog").close();
  if (last) ask(...last);
});
$("key-cancel").addEventListener("click", () => {
  $("key-dialog").close();
  fail("The server needs a key.", true);
});

useMode();
health().then(
  ({ model }) => ($("model").textContent = model === "nano" ? "nano (demo)" : model),
  () => fail("The server does not answer. Check that molmo-edge serve still runs, then reload this page.", false),
);
