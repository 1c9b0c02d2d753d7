// Ask: a text, the answer with each label's probability, the words that drove it, and whether it was right.

import { ApiError, hasKey, patient, request } from "./api.js";
import { bar } from "./charts.js";
import { count, fill, h, newId, percent } from "./dom.js";
import { tableSection } from "./table.js";

const MOST_BARS = 8;

// The other tasks are asked at a route of their own, and their answers shown as they are.
const OTHERS = {
  summarization: { path: "summary", body: (text) => ({ text, min_length: 10, max_length: 80 }), shown: (one) => one.summary },
  "text-generation": { path: "generate", body: (text) => ({ inputs: text, parameters: { max_new_tokens: 60 } }) },
  "feature-extraction": { path: "embed", body: (text) => ({ inputs: text }) },
};

let draft = ""; // what stands in the box, while another view is shown or the key is entered

export function askView(server) {
  const classifies = server.task === "text-classification";
  const box = h("textarea", { id: newId(), rows: 4, "aria-describedby": "ask-hint", value: draft });
  const button = h("button", { class: "main", type: "submit" }, "Ask");
  const examples = h("ul", { class: "examples", "aria-label": "Examples from the test" });
  const result = h("div", { class: "result", "aria-live": "polite" });
  box.addEventListener("input", () => (draft = box.value));
  const put = (text) => {
    draft = box.value = text;
    box.focus();
  };

  async function submit(event) {
    event?.preventDefault();
    if (button.disabled) return;
    const text = box.value;
    if (!text.trim()) {
      fill(result, h("p", { class: "warn" }, "There is no text yet."));
      box.focus();
      return;
    }
    button.disabled = true;
    const waiting = (left) => fill(result, overloaded(left));
    try {
      if (classifies) await classify(text, result, waiting);
      else await other(server.task, text, result, waiting);
    } catch (error) {
      fill(result, failure(error));
    } finally {
      button.disabled = false;
    }
  }

  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  if (classifies && server.shown) {
    request("examples").then(
      ({ content }) =>
        fill(
          examples,
          content.texts.map((text) => h("li", {}, h("button", { type: "button", title: text, onclick: () => put(text) }, text))),
        ),
      () => {}, // a server without a store has none
    );
  }
  const parts = [
    h(
      "section",
      {},
      !server.shown && h("p", { class: "warn" }, "This server answers only with its API key. Enter it above."),
      h(
        "form",
        { onsubmit: submit },
        h("label", { for: box.id }, "Text"),
        box,
        examples,
        h("div", { class: "row" }, button, h("span", { id: "ask-hint", class: "note" }, h("kbd", {}, "Ctrl"), " + ", h("kbd", {}, "Enter"), " asks, too.")),
      ),
      result,
    ),
    classifies && tableSection(),
  ];
  return { parts };
}

const overloaded = (left) =>
  h("p", { class: "warn" }, `The server has more to do than it can take. Asking again in ${left} s …`);

export function failure(error) {
  if (!(error instanceof ApiError)) throw error;
  const words =
    error.status === 401
      ? "This server wants its API key. Enter it above, and ask again."
      : error.status === 429
        ? "The server is still overloaded. Ask again in a while."
        : error.message;
  return h("p", { class: "bad", role: "alert" }, words);
}

async function other(task, text, result, waiting) {
  const how = OTHERS[task];
  if (!how) {
    fill(result, h("p", {}, "How this model is asked is described under API."));
    return;
  }
  const { content } = await patient(how.path, how.body(text), waiting);
  const shown = how.shown?.(content) ?? JSON.stringify(content, null, 1);
  fill(result, h("div", { class: "read" }, shown.length > 4000 ? `${shown.slice(0, 4000)} …` : shown));
}

async function classify(text, result, waiting) {
  const { content: answer, id } = await patient("inference", { text }, waiting);
  const read = h("div", { class: "read", tabindex: 0, "aria-label": "The text, and what was read of it" }, text);
  const words = h("p", { class: "note" }, "Looking for the words that drove the answer …");
  fill(
    result,
    h("h2", { class: "verdict" }, answer.label, " ", h("small", {}, percent(answer.scores[answer.label]))),
    answer.abstain && h("p", { class: "warn" }, "Abstains: too uncertain for what this version promises."),
    scoreList(answer.scores),
    h("h3", {}, "What drove it"),
    read,
    words,
    correction(answer, id),
    h(
      "p",
      { class: "note" },
      `${count(answer.tokens, "token")} read${answer.truncated ? ", and the rest of the text left out" : ""}; version `,
      h("code", {}, answer.model_version),
    ),
  );
  try {
    const { content } = await patient("explain", { text });
    if (content.model_version !== answer.model_version) throw new ApiError(0, "Another version answers by now.");
    fill(read, highlighted(text, content));
    fill(words, legend(content));
  } catch (error) {
    fill(words, `The words cannot be told: ${error.message}`);
  }
}

function scoreList(scores) {
  const ranked = Object.entries(scores).sort((one, other) => other[1] - one[1]);
  const item = ([label, score]) =>
    h("li", {}, h("span", { class: "name" }, label), bar(score), h("span", { class: "number" }, percent(score)));
  const rest = ranked.slice(MOST_BARS);
  return [
    h("ul", { class: "scores", "aria-label": "Probability of each label" }, ranked.slice(0, MOST_BARS).map(item)),
    rest.length > 0 &&
      h("details", {}, h("summary", {}, `${rest.length} more labels, ${percent(rest.reduce((sum, [, score]) => sum + score, 0))} together`), h("ul", { class: "scores" }, rest.map(item))),
  ];
}

// Positions count characters as Python does, which are whole code points, and not JavaScript's halves of some.
function highlighted(text, { spans, read, truncated }) {
  const points = Array.from(text);
  const slice = (start, end) => points.slice(start, end).join("");
  const most = Math.max(...spans.map(({ weight }) => Math.abs(weight)), 0.02);
  const parts = [];
  let at = 0;
  for (const { start, end, weight } of spans) {
    const strength = Math.abs(weight) / most;
    parts.push(slice(at, start));
    parts.push(
      strength < 0.12
        ? slice(start, end)
        : h(
            "mark",
            {
              class: weight < 0 ? "against" : "for",
              style: { "--weight": `${Math.round(60 * strength)}%` },
              title: `${weight < 0 ? "against" : "for"}: the probability would be ${percent(Math.abs(weight))} ${weight < 0 ? "higher" : "lower"} without it`,
            },
            slice(start, end),
          ),
    );
    at = end;
  }
  parts.push(slice(at, read));
  if (truncated) parts.push(h("span", { class: "end" }, "reading ended here"), h("span", { class: "unread" }, slice(read)));
  else parts.push(slice(read));
  return parts;
}

function legend({ label, spans }) {
  const strongest = spans.some(({ weight }) => Math.abs(weight) > 0.005);
  return [
    h("span", { class: "key-of" }, h("mark", {}, "speaks for"), " and ", h("mark", { class: "against" }, "against"), ` “${label}”: `),
    strongest
      ? "by how much its probability changes when the word is left out."
      : "but leaving out any single word changes next to nothing.",
  ];
}

function correction(answer, id) {
  const labels = Object.keys(answer.scores).sort();
  const said = h("span", { role: "status", class: "note" });
  const select = h(
    "select",
    { "aria-label": "The right label" },
    labels.map((label) => h("option", { value: label, selected: label === answer.label }, label)),
  );
  const row = h("div", { class: "row" });
  const send = async (label) => {
    row.querySelectorAll("button, select").forEach((one) => (one.disabled = true));
    try {
      const { content } = await patient("feedback", { label, request_id: id });
      const kept = hasKey() ? "It counts at the next training." : "Without the API key it is kept apart, and nothing is trained with it.";
      said.className = "note good";
      fill(said, `${content.stored ? "Thank you." : "That was said before."} ${kept}`);
    } catch (error) {
      said.className = "note bad";
      fill(said, error.message);
      row.querySelectorAll("button, select").forEach((one) => (one.disabled = false));
    }
  };
  const correct = () => {
    fill(row, h("label", {}, "The right label "), select, h("button", { class: "main", onclick: () => send(select.value) }, "Send"), said);
    select.focus();
  };
  fill(
    row,
    h("span", {}, "Was that right?"),
    h("button", { type: "button", onclick: () => send(answer.label) }, "Right"),
    h("button", { type: "button", onclick: correct }, "Wrong …"),
    said,
  );
  return row;
}
