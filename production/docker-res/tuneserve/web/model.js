// Model: which version answers and why, the others beside it, how it does now, and what changes it.

import { hasKey, request } from "./api.js";
import { failure } from "./ask.js";
import { bar, spark } from "./charts.js";
import { ask, count, duration, fill, h, percent, when } from "./dom.js";

const LOOK_MS = 15_000;
const NOW_MS = 2000;
const MINUTE_MS = 60_000;
const ROLES = { champion: "champion", previous: "the one before", challenger: "shadows the champion" };

export function modelView(server) {
  const now = h("section", {}, h("h2", {}, "Now"), h("p", {}, "…"));
  const versions = h("section", {}, h("h2", {}, "Versions"), h("p", {}, "…"));
  const drift = h("section", {}, h("h2", {}, "Drift"), h("p", {}, "…"));
  const labels = h("section", {}, h("h2", {}, "Accuracy on feedback"), h("p", {}, "…"));
  const view = { server, history: [], chosen: new Set(), said: h("p", { "aria-live": "polite" }), comparison: h("div") };
  const each = [
    [versions, "Versions", (content) => versionParts(content, view, refresh), "versions"],
    [drift, "Drift", driftParts, "drift"],
    [labels, "Accuracy on feedback", feedbackParts, "feedback"],
  ];
  async function refresh() {
    drift.hidden = labels.hidden = view.server.phase !== "ready";
    await Promise.all(
      each.map(async ([section, title, parts, path]) => {
        if (section.hidden || !section.isConnected) return;
        try {
          fill(section, h("h2", {}, title), parts((await request(path)).content));
        } catch (error) {
          if (error.status === 404) section.remove();
          else fill(section, h("h2", {}, title), failure(error));
        }
      }),
    );
  }
  const showNow = () => fill(now, h("h2", {}, "Now"), nowParts(view));
  const timers = [
    setInterval(() => !document.hidden && !versions.contains(document.activeElement) && refresh(), LOOK_MS),
    setInterval(() => !document.hidden && showNow(), NOW_MS),
  ];
  setTimeout(refresh); // once the sections are on the page
  const update = (server) => {
    const changed = server.version !== view.server.version || server.job?.state !== view.server.job?.state;
    view.server = server;
    if (server.shown) view.history.push({ at: Date.now(), ...server.figures });
    showNow();
    if (changed) refresh();
  };
  return { parts: [now, versions, drift, labels], update, close: () => timers.forEach(clearInterval) };
}

function nowParts(view) {
  const { figures, shown } = view.server;
  if (!shown || !view.history.length) return h("p", { class: "note" }, "With the API key, requests and latency are shown here.");
  // Events come when something has changed: the newest that is older than a minute is how it stood a minute ago.
  const since = Date.now() - MINUTE_MS;
  const old = view.history.findLastIndex(({ at }) => at < since);
  view.history = view.history.slice(Math.max(0, old));
  const [first] = view.history;
  const seconds = (Date.now() - Math.max(first.at, since)) / 1000;
  const rates = view.history.slice(1).map((one, index) => (1000 * (one.answered - view.history[index].answered)) / Math.max(1, one.at - view.history[index].at));
  const answered = figures.answered - first.answered;
  const item = (name, value, ...more) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more));
  const quantile = (share) => quantileOf(first.seconds, figures.seconds, share);
  return [
    h(
      "dl",
      { class: "figures" },
      item("Answers, last minute", answered.toLocaleString(), seconds > 3 && h("small", {}, `${(answered / seconds).toFixed(1)} a second`)),
      item("Median time", quantile(0.5) ?? "–", h("small", {}, `95%: ${quantile(0.95) ?? "–"}`)),
      item("Tokens that wait", (figures.queue_tokens ?? 0).toLocaleString(), h("small", {}, figures.drain_s ? `about ${duration(figures.drain_s)}` : "nothing waits")),
      item("Refused as too much", figures.refused.toLocaleString(), h("small", {}, `${figures.failed.toLocaleString()} failed, since the start`)),
    ),
    rates.some((one) => one > 0) && spark(rates, "Answers a second in the last minute"),
  ];
}

// In words; by linear interpolation within the bucket, as Prometheus does it.
function quantileOf(before, now, share) {
  const counts = now.map(([bound, number], index) => [bound, number - (before[index]?.[1] ?? 0)]);
  const total = counts.at(-1)?.[1] ?? 0; // the last bucket has no bound
  if (!total) return null;
  let [lower, below] = [0, 0];
  for (const [bound, number] of counts) {
    if (number >= share * total) {
      if (bound === null) return `over ${lower} s`;
      const seconds = lower + ((bound - lower) * (share * total - below)) / Math.max(1, number - below);
      return seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`;
    }
    [lower, below] = [bound, number];
  }
  return null;
}

function versionParts({ answers, versions }, view, refresh) {
  const { server } = view;
  const may = server.keyed && hasKey();
  const { said, comparison } = view; // they stay while the list around them is made anew
  const act = async (path, body, words) => {
    try {
      const { content } = await request(path, body);
      fill(said, h("span", { class: "good" }, words(content)));
    } catch (error) {
      fill(said, h("span", { class: "bad" }, error.message));
    }
    await refresh();
  };
  const retrain = () => act("retrain", {}, () => "A training has begun; see Training.");
  const promote = async (id) => {
    const sure = await ask("Promote this version?", `${id} will answer instead of ${answers}, whatever the gate decided.`, "Promote");
    if (sure) await act("promote", { version: id }, () => `${id} is the champion.`);
  };
  const rollback = async (id) => {
    const words = `${id} is withdrawn for good: no retraining brings it back, and the version before it answers again.`;
    if (await ask("Roll back?", words, "Roll back")) {
      await act("rollback", { version: id }, (content) => `${content.champion} is the champion again; ${id} is withdrawn.`);
    }
  };
  const toggle = (id, checked) => {
    view.chosen[checked ? "add" : "delete"](id);
    while (view.chosen.size > 2) view.chosen.delete([...view.chosen][0]);
    document.querySelectorAll("input[data-version]").forEach((one) => (one.checked = view.chosen.has(one.dataset.version)));
    compare([...view.chosen], comparison);
  };
  const has = (role) => versions.some((one) => one.role === role);
  return [
    server.trains &&
      h(
        "p",
        { class: "row" },
        h("button", { type: "button", class: "main", disabled: !may || Boolean(server.training.phase), onclick: retrain }, "Retrain now"),
        !may && h("span", { class: "note" }, server.keyed ? "Enter the API key to change what answers." : "Set API_KEY to let the page change what answers."),
      ),
    said,
    versions.length === 0 && h("p", {}, "There is none yet."),
    versions.length > 0 &&
      h(
        "div",
        { class: "wide", tabindex: 0, role: "region", "aria-label": "The versions" },
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, ["Compare", "Version", "Texts", "Test", "Decision", "Change"].map((name) => h("th", { scope: "col" }, name)))),
          h(
            "tbody",
            {},
            versions.map((one) =>
              h(
                "tr",
                { class: one.id === answers ? "answers" : "" },
                h("td", {}, h("input", { type: "checkbox", "data-version": one.id, "aria-label": `Compare ${one.id}`, checked: view.chosen.has(one.id), onchange: (event) => toggle(one.id, event.target.checked) })),
                h("td", {}, h("code", {}, one.id), h("br"), h("span", { class: "note" }, when(one.created_at)), " ", one.id === answers && h("span", { class: "tag on" }, "answers"), " ", one.role && h("span", { class: "tag" }, ROLES[one.role])),
                h("td", { class: "number" }, one.train_texts?.toLocaleString() ?? ""),
                h("td", { class: "number" }, one.test.accuracy === undefined ? "" : [percent(one.test.accuracy), h("br"), h("span", { class: "note" }, `F1 ${percent(one.test.macro_f1)}`, one.abstention?.test && [h("br"), `answers ${percent(one.abstention.test.answered_share)}`])]),
                h("td", { class: "words" }, decisionWords(one.decision)),
                h(
                  "td",
                  {},
                  one.role === "champion"
                    ? h("button", { type: "button", disabled: !may || !has("previous"), onclick: () => rollback(one.id) }, "Roll back")
                    : h("button", { type: "button", disabled: !may, onclick: () => promote(one.id) }, "Promote"),
                ),
              ),
            ),
          ),
        ),
      ),
    versions.length > 1 && h("p", { class: "note" }, "Two of them can be compared."),
    comparison,
  ];
}

function decisionWords(decision) {
  if (!decision) return "not judged";
  const kind = decision.withdrawn_at ? "bad" : { accepted: "good", refused: "bad" }[decision.verdict] ?? "";
  const verdict = decision.withdrawn_at ? `withdrawn ${when(decision.withdrawn_at)}` : decision.by === "person" ? "promoted" : decision.verdict;
  return [
    h("strong", { class: kind }, verdict),
    `: ${decision.sentence}`,
    decision.checks.length > 0 &&
      h("details", {}, h("summary", {}, count(decision.checks.length, "check")), h("ul", {}, decision.checks.map((one) => h("li", { class: one.passed ? "" : "bad" }, `${one.passed ? "passed" : "failed"}: ${one.sentence}`)))),
  ];
}

// Of a folder's path its last part says enough.
const shortened = (name) => (/^[/.~]/.test(name ?? "") ? `… /${name.split("/").filter(Boolean).at(-1)}` : name);

async function compare(ids, place) {
  if (ids.length < 2) return fill(place);
  try {
    const both = (await Promise.all(ids.sort().map((id) => request(`versions/${encodeURIComponent(id)}`)))).map(({ content }) => content);
    const settings = [...new Set(both.flatMap(({ metadata }) => Object.keys(metadata.settings ?? {})))];
    const rows = [
      ["created", (one) => when(one.created_at)],
      ["training texts", (one) => one.train_texts],
      ["test accuracy", (one) => one.test.accuracy !== undefined && percent(one.test.accuracy, 2)],
      ["macro F1", (one) => one.test.macro_f1 !== undefined && percent(one.test.macro_f1, 2)],
      ["log loss", (one) => one.test.log_loss?.toFixed(4)],
      ["calibration error", (one) => one.test.ece !== undefined && percent(one.test.ece, 2)],
      ["seconds", (one) => one.duration_s?.toFixed(0)],
      ["base model", (one) => shortened(one.metadata.base_model?.name)],
    ];
    const text = (value) => (value === undefined || value === null || value === false ? "" : String(value));
    const row = (name, cells, always) => {
      const [one, other] = cells.map(text);
      if (one === other && !always) return null;
      return h("tr", {}, h("th", { scope: "row" }, name), [one, other].map((cell) => h("td", { class: one === other ? "" : "differs" }, cell)));
    };
    fill(
      place,
      h("h3", {}, "Compared"),
      h(
        "div",
        { class: "wide", tabindex: 0, role: "region", "aria-label": "Two versions compared" },
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, h("td"), both.map((one) => h("th", { scope: "col" }, h("code", {}, one.id))))),
          h(
            "tbody",
            {},
            rows.map(([name, value]) => row(name, both.map(value), true)),
            settings.map((name) => row(name.toUpperCase(), both.map((one) => one.metadata.settings?.[name]))),
          ),
        ),
      ),
      h("p", { class: "note" }, "Of the settings those that differ are shown."),
    );
  } catch (error) {
    fill(place, failure(error));
  }
}

function driftParts(report) {
  return [
    h("p", { class: report.drifted ? "warn" : "" }, report.sentence),
    report.figures.map((one) =>
      h(
        "div",
        {},
        h("h3", { class: one.drifted ? "warn" : "" }, one.name, one.drifted ? ": drifted" : ""),
        bar(one.value, { kind: one.drifted ? "bad" : "", bound: one.threshold, most: Math.max(3 * one.threshold, one.value) }),
        h("p", { class: "note" }, one.sentence),
      ),
    ),
    report.figures.length > 0 && h("p", { class: "note" }, "The upright line is where a difference is called drift."),
  ];
}

function feedbackParts({ labels, labelled_texts, kept_apart, accuracy, promise }) {
  return [
    accuracy
      ? [
          h("p", {}, `${percent(accuracy.accuracy)} of the last ${accuracy.count.toLocaleString()} labelled answers of this version were right; with 95% certainty between ${percent(accuracy.low)} and ${percent(accuracy.high)}.`),
          bar(accuracy.accuracy, { range: [accuracy.low, accuracy.high] }),
        ]
      : h("p", {}, "No answer of this version has been labelled yet."),
    promise?.count > 0 &&
      h("p", { class: promise.kept ? "" : "bad" }, `Of ${promise.count.toLocaleString()} that did not abstain ${percent(promise.error)} were wrong; at most ${percent(promise.max_error)} are promised${promise.kept ? "" : ", which holds no longer"}.`),
    h("p", { class: "note" }, `${count(labels, "label")} in all; ${labelled_texts.toLocaleString()} to train with, ${kept_apart.toLocaleString()} kept apart because they came without a key.`),
  ];
}
