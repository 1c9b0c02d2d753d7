// Label: the texts whose labels would teach the most, one key a label. A label is sent when the next one is given, or a
// few seconds later, so that the last one can be taken back.

import { hasKey, patient, request } from "./api.js";
import { count, fill, h, newId, percent } from "./dom.js";
import { failure } from "./ask.js";

const AT_ONCE = 20;
const MOST_SKIPPED = 200; // as the server has it
const FEW = 8;
const SEND_AFTER_MS = 5000;
const MOST_KEYS = 9;

const REASONS = {
  unsure: "the model is unsure",
  common: "many texts are like it",
  length: "its length is rare in the test",
  unknown: "it has words that are rare in the test",
};

const needs = (title, ...words) => ({
  parts: [h("section", { class: "empty" }, h("h2", {}, title), words.map((one) => h("p", {}, one)))],
});

export function labelView(server) {
  if (server.task !== "text-classification") return needs("Nothing to label", "Only the answers of a classifier are labels.");
  if (!server.keyed) {
    return needs(
      "Labelling wants an API key",
      "This server has none, so it shows nobody’s texts, and trains with nobody’s labels.",
      h("span", {}, "Start it with ", h("code", {}, "API_KEY"), " and ", h("code", {}, "KEEP_TEXTS=1"), "."),
    );
  }
  if (!hasKey()) return needs("Labelling wants the API key", "Enter it above.");
  if (server.phase !== "ready") return needs("No model answers yet", "Texts can be labelled once one does.");
  const section = h("section", {}, h("p", {}, "Looking for texts …"));
  const session = new Session(section, server.version);
  session.start();
  return { parts: [section], update: (server) => session.update(server), close: () => session.close() };
}

class Session {
  constructor(section, version) {
    this.section = section;
    this.version = version;
    this.failures = h("div", { "aria-live": "assertive" });
    this.keys = true;
    this.ended = new AbortController();
    this.queue = [];
    this.done = [];
    this.pending = null;
    this.known = new Set();
    this.skipped = 0;
    this.fetching = null;
    this.began = Date.now();
    this.labels = [];
  }

  async start() {
    try {
      await Promise.all([this.readLabels(), this.fetchMore()]);
      this.show();
      const { signal } = this.ended;
      document.addEventListener("keydown", (event) => this.key(event), { signal });
      addEventListener("pagehide", () => this.send(), { signal });
    } catch (error) {
      fill(this.section, failure(error));
    }
  }

  async readLabels() {
    this.labels = [...(await request("model")).content.labels].sort();
  }

  // Another version may have other labels.
  async update({ version, phase }) {
    if (phase !== "ready" || version === this.version) return;
    this.version = version;
    this.queue = [];
    await this.readLabels().catch(() => {});
    await this.next();
  }

  // The page shows another view: what was given is sent.
  close() {
    this.ended.abort();
    this.send();
  }

  // Texts that were skipped, or whose label is not sent yet, may come again, and are left out.
  async more() {
    const skip = Math.min(MOST_SKIPPED, this.skipped);
    const { content } = await patient(`label/next?count=${AT_ONCE}&skip=${skip}`);
    this.left = content.unlabelled;
    const here = new Set(this.queue.map(({ text }) => text));
    this.queue.push(...content.texts.filter(({ text }) => !this.known.has(text) && !here.has(text)));
  }

  // One at a time; whoever asks meanwhile waits for the same.
  fetchMore() {
    this.fetching ??= this.more().finally(() => (this.fetching = null));
    return this.fetching;
  }

  show() {
    const [now] = this.queue;
    if (!now) {
      const words =
        this.left === 0
          ? "There is no text without a label. Texts come here as they are asked, with KEEP_TEXTS=1."
          : "What would teach the most has been labelled or skipped.";
      fill(this.section, this.failures, h("div", { class: "empty" }, h("h2", {}, this.done.length ? "All done" : "Nothing to label yet"), h("p", {}, words), h("p", {}, h("button", { type: "button", onclick: () => this.next() }, "Look again")), this.footer()));
      return;
    }
    const likely = Object.entries(now.scores).sort((one, other) => other[1] - one[1]).map(([label]) => label);
    // Few labels keep their places, which the fingers learn; of many the likeliest are proposed.
    const proposed = this.labels.length <= MOST_KEYS ? this.labels : likely;
    this.proposed = proposed;
    const choices = proposed.map((label, index) =>
      h(
        "button",
        { type: "button", onclick: () => this.give(label) },
        h("kbd", {}, index + 1),
        h("span", {}, label),
        label in now.scores && h("small", {}, percent(now.scores[label], 0)),
      ),
    );
    const id = newId();
    const others =
      proposed.length < this.labels.length &&
      h(
        "p",
        { class: "row" },
        h("label", { for: id }, "Another label"),
        h(
          "select",
          { id },
          h("option", { value: "" }, "choose …"),
          this.labels.map((label) => h("option", { value: label }, label)),
        ),
        h("button", { type: "button", onclick: () => this.give(document.getElementById(id).value) }, "Give"),
      );
    const hadFocus = this.section.contains(document.activeElement) && document.activeElement.tagName !== "INPUT";
    const text = h("div", { class: "to-label", tabindex: -1, "aria-label": "The text to label" }, now.text);
    const why = now.why.map((one) => REASONS[one] ?? one);
    fill(
      this.section,
      this.failures,
      h("h2", { class: "skip" }, "Label this text"),
      text,
      h("p", { class: "note" }, why.length ? `Chosen because ${why.join(", and ")}.` : "The next in the list."),
      h("div", { class: "choices", role: "group", "aria-label": "Labels" }, choices),
      others,
      this.footer(),
    );
    if (hadFocus) text.focus(); // where it was before has gone, and the new text is read out
  }

  footer() {
    const hours = (Date.now() - this.began) / 3.6e6;
    const rate = this.done.length >= 5 ? `, ${Math.round(this.done.length / hours).toLocaleString()} an hour` : "";
    return h(
      "div",
      { class: "row between" },
      h(
        "span",
        { class: "row" },
        this.queue.length > 0 && h("button", { type: "button", class: "quiet", onclick: () => this.skip() }, h("kbd", {}, "S"), " Skip"),
        this.done.length > 0 && h("button", { type: "button", class: "quiet", onclick: () => this.undo() }, h("kbd", {}, "U"), " Undo"),
        h("label", { class: "note" }, h("input", { type: "checkbox", class: "tick-box", checked: this.keys, onchange: (event) => (this.keys = event.target.checked) }), " keys without Ctrl"),
      ),
      h("span", { class: "note", role: "status" }, `${count(this.done.length, "label")} given${rate}; ${count(this.left ?? 0, "text")} without one when last looked`),
    );
  }

  async give(label) {
    if (!label || !this.queue.length) return;
    const now = this.queue.shift();
    this.known.add(now.text);
    this.send();
    this.pending = { now, label };
    this.done.push({ now, label });
    this.timer = setTimeout(() => this.send(), SEND_AFTER_MS);
    await this.next();
  }

  async skip() {
    const now = this.queue.shift();
    if (now) {
      this.known.add(now.text);
      this.skipped++;
    }
    await this.next();
  }

  async next() {
    if (this.queue.length) {
      this.show();
      if (this.queue.length <= FEW) this.fetchMore().catch(() => {}); // said when nothing is left
      return;
    }
    fill(this.section, h("p", {}, "Looking for texts …"));
    try {
      await this.fetchMore();
      this.show();
    } catch (error) {
      fill(this.section, failure(error), this.footer());
    }
  }

  // The last label comes back; if it was sent already, the one that is given now counts instead.
  undo() {
    const last = this.done.pop();
    if (!last) return;
    if (this.pending?.now === last.now) this.pending = null;
    this.known.delete(last.now.text);
    this.queue.unshift(last.now);
    this.show();
  }

  async send() {
    clearTimeout(this.timer);
    const { pending } = this;
    this.pending = null;
    if (!pending) return;
    try {
      await patient("feedback", { text: pending.now.text, label: pending.label }, undefined, { keepalive: true });
    } catch (error) {
      this.done = this.done.filter((one) => one.now !== pending.now);
      this.known.delete(pending.now.text);
      this.queue.push(pending.now); // it comes again
      this.failures.append(h("p", { class: "bad" }, `“${pending.now.text.slice(0, 60)}” was not labelled, and comes again: ${error.message}`));
      while (this.failures.childElementCount > 3) this.failures.firstChild.remove();
    }
  }

  key(event) {
    if (!this.keys || event.repeat || event.ctrlKey || event.metaKey || event.altKey || /^(TEXTAREA|SELECT)$/.test(event.target.tagName) || (event.target.tagName === "INPUT" && event.target.type !== "checkbox") || document.querySelector("dialog[open]")) return;
    const index = Number(event.key) - 1;
    if (event.key.length === 1 && this.proposed?.[index]) this.give(this.proposed[index]);
    else if (event.key === "s" || event.key === "S") this.skip();
    else if (event.key === "u" || event.key === "U") this.undo();
    else return;
    event.preventDefault();
  }
}
