// An answer on the page: its text, its points as a list, and their marks on the photo. Text of the model is inserted
// as text only.

import { readable } from "./questions.js";

/** Make an element; `children` are elements or texts. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** "50.3" of 640 pixels -> 322 */
const pixels = (percent, size) => Math.round((percent / 100) * size);

export class AnswerCard {
  /** `show(card)` is called when the user wants to see the points of this card on the photo. */
  constructor(question, picture, mode, show) {
    this.points = [];
    this.picture = picture;
    this.mode = mode;
    this.raw = "";
    this.count = null;
    this.heading = element("h3", {}, question);
    this.number = element("p", { class: "number" });
    this.number.hidden = true;
    this.text = element("p", { class: "text" });
    this.list = element("ol", { class: "points", "aria-label": "Points" });
    this.list.hidden = true;
    this.note = element("p", { class: "hint" });
    this.note.hidden = true;
    this.actions = element("div", { class: "row actions" });
    this.showButton = element("button", { type: "button", class: "small" }, "Show the points");
    this.showButton.addEventListener("click", () => show(this));
    this.showButton.hidden = true;
    this.root = element(
      "article",
      { class: "answer running" },
      this.heading,
      this.number,
      this.text,
      this.list,
      this.note,
      this.actions,
    );
  }

  addText(text) {
    this.raw += text;
    this.text.textContent = readable(this.raw, false);
  }

  /** Replace the points: at the end of the answer, they have labels. */
  setPoints(points) {
    this.points = [];
    this.list.replaceChildren();
    this.list.hidden = true;
    for (const point of points) this.addPoint(point);
  }

  addPoint(point) {
    this.points.push(point);
    const { width, height } = this.picture;
    const place = `${point.x.toFixed(1)} %, ${point.y.toFixed(1)} %`;
    const exact = `${pixels(point.x, width)}, ${pixels(point.y, height)} px`;
    const copy = copyButton("Copy", () => `${pixels(point.x, width)}, ${pixels(point.y, height)}`);
    copy.setAttribute("aria-label", `Copy the pixels of point ${this.points.length}`);
    const item = element(
      "li",
      {},
      element("span", { class: "label" }, point.label),
      element("span", { class: "places" }, element("span", {}, place), " ", element("span", {}, exact)),
      copy,
    );
    item.dataset.number = this.points.length;
    this.list.append(item);
    this.list.hidden = false;
    if (this.mode === "count") this.setCount(this.points.length);
  }

  setCount(count) {
    this.count = count;
    if (this.mode === "count") {
      this.number.textContent = String(count);
      this.number.hidden = false;
    }
  }

  /** `note`: why the answer is not whole; "" if it is. */
  finish(note) {
    this.root.classList.remove("running");
    this.text.textContent = readable(this.raw, !note).trim(); // without a tag that was cut off
    if (!this.text.textContent && !this.points.length && !note) note = "The model gave no answer.";
    this.note.textContent = note;
    this.note.hidden = !note;
    if (this.text.textContent) this.actions.append(copyButton("Copy text", () => this.text.textContent));
    if (this.points.length) {
      this.actions.append(
        copyButton("Copy points", () => this.asText()),
        copyButton("Copy JSON", () => JSON.stringify(this.asData(), null, 2)),
        this.showButton,
      );
    }
  }

  /** What a screen reader says of the answer. */
  get spoken() {
    const points = this.points.length;
    const counted = this.mode === "count" && this.count !== null ? `${this.count}. ` : "";
    const pointed = points ? ` ${points} ${points === 1 ? "point" : "points"}, listed below the answer.` : "";
    return counted + this.text.textContent + (pointed && `.${pointed}`);
  }

  asData() {
    const { width, height } = this.picture;
    return this.points.map(({ x, y, label }) => ({ x, y, label, pixel: [pixels(x, width), pixels(y, height)] }));
  }

  asText() {
    return this.asData()
      .map(({ x, y, label, pixel }, i) => `${i + 1}\t${label}\t${x} %\t${y} %\t${pixel[0]} px\t${pixel[1]} px`)
      .join("\n");
  }
}

/** Put the mark of point `number` on the photo. */
export function addMark(marks, point, number) {
  const mark = element("span", { class: "mark" }, String(number));
  mark.dataset.number = number;
  placeMark(mark, point);
  marks.append(mark);
}

export function placeMark(mark, point) {
  mark.style.left = `${Math.min(100, Math.max(0, point.x))}%`;
  mark.style.top = `${Math.min(100, Math.max(0, point.y))}%`;
}

function copyButton(title, text) {
  const button = element("button", { type: "button", class: "small" }, title);
  button.addEventListener("click", async () => {
    const done = await copy(text());
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = title), 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain HTTP from another machine, browsers have only the older way.
    const area = element("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}
