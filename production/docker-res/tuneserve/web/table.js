// A table of texts, pasted or dropped, comes back scored. It stays in this page's memory.

import { ApiError, patient } from "./api.js";
import { count, fill, h, newId } from "./dom.js";

const AT_ONCE = 64;
const MOST_BYTES = 400_000; // of one request; a server takes a MiB unless it was told otherwise
const SHOWN = 20;

let last = ""; // the address of the newest scored table, whose memory is given back when there is a newer one

// Rows of CSV as RFC 4180 has it; the separator is the one of comma, semicolon and tab that the first line has most of.
export function parseCsv(content) {
  const text = content.replace(/^\uFEFF/, "");
  const first = text.slice(0, Math.max(0, text.indexOf("\n")) || undefined);
  const separator = [",", ";", "\t"].sort((one, other) => first.split(other).length - first.split(one).length)[0];
  const rows = [];
  let row = [];
  let field = "";
  let quoted = false;
  for (let at = 0; at < text.length; at++) {
    const sign = text[at];
    if (quoted) {
      if (sign !== '"') field += sign;
      else if (text[at + 1] === '"') field += text[++at];
      else quoted = false;
    } else if (sign === '"' && field === "") quoted = true;
    else if (sign === separator) {
      row.push(field);
      field = "";
    } else if (sign === "\n" || sign === "\r") {
      if (sign === "\r" && text[at + 1] === "\n") at++;
      rows.push([...row, field]);
      row = [];
      field = "";
    } else field += sign;
  }
  if (field !== "" || row.length) rows.push([...row, field]);
  return rows.filter((one) => one.length > 1 || one[0].trim() !== "");
}

// A field that a spreadsheet would take for a formula gets a ' before it, unless it is a number; all are quoted.
const quoted = (value) => {
  const risky = /^\s*[=+\-@＝＋－＠]|^[\t\r\n]/.test(value) && !/^[+-]?\d+([.,]\d+)?(e[+-]?\d+)?$/i.test(value);
  return `"${risky ? "'" : ""}${value.replaceAll('"', '""')}"`;
};

export const writeCsv = (rows) => rows.map((row) => `${row.map((one) => quoted(String(one))).join(",")}\r\n`).join("");

const bytesOf = (text) => new TextEncoder().encode(JSON.stringify(text)).length;

// Texts in lists that one request each can hold.
function* portions(texts) {
  for (let begin = 0, end = 0; begin < texts.length; begin = end) {
    for (let size = 0; end < texts.length && end - begin < AT_ONCE; end++) {
      size += bytesOf(texts[end]) + 1;
      if (size > MOST_BYTES && end > begin) break;
    }
    yield texts.slice(begin, end);
  }
}

// The answer to each text, or why there is none. What is too large for the server is asked in halves.
async function predict(texts, waiting) {
  try {
    return (await patient("inference/batch", { texts }, waiting, { attempts: 100 })).content.predictions;
  } catch (error) {
    if (!(error instanceof ApiError) || error.status === 401) throw error;
    if (error.status !== 413 || texts.length === 1) return texts.map(() => ({ error: error.message }));
    const half = texts.length >> 1;
    return [...(await predict(texts.slice(0, half), waiting)), ...(await predict(texts.slice(half), waiting))];
  }
}

export function tableSection() {
  const file = h("input", { type: "file", accept: ".csv,.tsv,.txt,text/csv", id: newId() });
  const pasted = h("textarea", { id: newId(), rows: 3, placeholder: "text,…" });
  const setting = h("div", {});
  const outcome = h("div", { "aria-live": "polite" });
  const drop = h("div", { class: "drop" }, h("label", { for: file.id }, "A CSV file, chosen or dropped here"), file, h("p", {}), h("label", { for: pasted.id }, "Or its rows, pasted"), pasted);
  let run = 0;

  const take = (content) => {
    run++;
    fill(outcome);
    const rows = parseCsv(content);
    if (!rows.length) return fill(setting, h("p", { class: "warn" }, "There are no rows in it."));
    choose(rows, setting, (column, head) => score(rows, column, head, outcome, ++run, () => run));
  };
  file.addEventListener("change", async () => file.files[0] && take(await file.files[0].text()));
  pasted.addEventListener("input", () => take(pasted.value));
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [dropped] = event.dataTransfer.files;
    take(dropped ? await dropped.text() : event.dataTransfer.getData("text"));
  });
  return h(
    "section",
    {},
    h("h2", {}, "A whole table"),
    h("p", { class: "note" }, "Each row gets its label and probability. The table stays in this page; its texts go to this server alone."),
    drop,
    setting,
    outcome,
  );
}

function choose(rows, setting, start) {
  const width = rows.reduce((most, row) => Math.max(most, row.length), 0);
  const length = (column) => rows.slice(1, 200).reduce((sum, row) => sum + (row[column]?.length ?? 0), 0);
  const named = rows[0].findIndex((name) => /^(text|sentence|review|comment|content|body|message)$/i.test(name.trim()));
  const longest = [...Array(width).keys()].sort((one, other) => length(other) - length(one))[0];
  const columns = h(
    "select",
    { id: newId() },
    [...Array(width).keys()].map((column) =>
      h("option", { value: column, selected: column === (named >= 0 ? named : longest) }, rows[0][column]?.slice(0, 40) || `column ${column + 1}`),
    ),
  );
  const head = h("input", { type: "checkbox", id: newId(), checked: rows.length > 1 && (named >= 0 || width > 1), class: "tick-box" });
  fill(
    setting,
    h(
      "div",
      { class: "row" },
      h("label", { for: columns.id }, "Texts are in"),
      columns,
      h("span", {}, head, " ", h("label", { for: head.id, style: { display: "inline" } }, "the first row has names")),
      h("button", { class: "main", type: "button", onclick: () => start(Number(columns.value), head.checked) }, `Score ${count(rows.length, "row")}`),
    ),
  );
}

async function score(rows, column, head, outcome, mine, current) {
  const body = head ? rows.slice(1) : rows;
  const texts = body.map((row) => row[column] ?? "");
  const bar = h("progress", { max: texts.length, value: 0, "aria-label": "Rows scored" });
  const said = h("p", { class: "note", role: "status" });
  fill(outcome, h("p", {}), bar, said);
  const answers = [];
  try {
    for (const portion of portions(texts)) {
      const found = await predict(portion, (left) => fill(said, `The server is busy; going on in ${left} s …`));
      if (mine !== current() || !outcome.isConnected) return;
      answers.push(...found);
      bar.value = answers.length;
      fill(said, `${bar.value.toLocaleString()} of ${count(texts.length, "row")}`);
    }
  } catch (error) {
    if (mine === current()) fill(outcome, h("p", { class: "bad", role: "alert" }, error.message));
    return;
  }
  const width = rows.reduce((most, row) => Math.max(most, row.length), 0);
  const names = [...Array(width).keys()].map((index) => (head && rows[0][index]) || (index === column ? "text" : `column_${index + 1}`));
  const promises = answers.some((one) => one.abstain !== undefined);
  const abstains = (one) => (promises ? [one.abstain === undefined ? "" : one.abstain ? "yes" : "no"] : []);
  const titles = ["prediction", "probability", ...(promises ? ["abstains"] : []), "error"];
  const cells = answers.map((one) => (one.error === undefined ? [one.label, one.scores[one.label].toFixed(4), ...abstains(one), ""] : ["", "", ...abstains(one), one.error]));
  const scored = [[...names, ...titles], ...body.map((row, index) => [...names.map((_, at) => row[at] ?? ""), ...cells[index]])];
  if (last) URL.revokeObjectURL(last);
  const link = (last = URL.createObjectURL(new Blob([writeCsv(scored)], { type: "text/csv" })));
  const totals = new Map();
  for (const [label] of cells) if (label) totals.set(label, (totals.get(label) ?? 0) + 1);
  const most = [...totals].sort((one, other) => other[1] - one[1]).slice(0, 8);
  fill(
    outcome,
    h("p", {}),
    h("p", { role: "status" }, `${count(texts.length, "row")} scored: ${most.map(([label, number]) => `${label} ${number.toLocaleString()}`).join(", ")}. `, h("a", { href: link, download: "scored.csv" }, "Save as CSV")),
    h(
      "div",
      { class: "wide", tabindex: 0, role: "region", "aria-label": "The first rows" },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, ["text", ...titles].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, cells.slice(0, SHOWN).map((one, index) => h("tr", {}, h("td", { class: "cell" }, texts[index].slice(0, 200)), one.map((cell) => h("td", {}, cell))))),
      ),
    ),
    texts.length > SHOWN && h("p", { class: "note" }, `The first ${SHOWN} rows are shown.`),
  );
}
