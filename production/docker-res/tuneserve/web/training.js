// Training: how far it is, its curves, and what was found in the data; all of it from the server's events.

import { lineChart } from "./charts.js";
import { duration, fill, h, percent, when } from "./dom.js";

const STEPS = [
  ["preparing", "Preparing"],
  ["training", "Training"],
  ["testing", "Testing"],
  ["judging", "Judging"],
];

const NOW = {
  preparing: "The base model and the data are being looked at.",
  training: "The model learns from the training texts.",
  testing: "It is tested with texts that it has not seen, and saved.",
  judging: "The gate compares it with the version that answers.",
};

export function trainingView() {
  const section = h("section", {});
  const update = (server) => fill(section, shown(server));
  return { parts: [section], update };
}

function shown({ trains, training, course = {}, job, shown: known }) {
  if (!trains) return [h("div", { class: "empty" }, h("h2", {}, "This server does not train"), h("p", {}, "It serves what others have put into its store."))];
  const { phase } = training;
  const curves = [
    { name: "training loss", kind: "plain", points: course.losses ?? [] },
    { name: "validation loss", kind: "marked", points: course.validation_losses ?? [] },
  ].filter((curve) => curve.points.length);
  const parts = [];
  if (phase) {
    const at = STEPS.findIndex(([name]) => name === phase);
    parts.push(
      h("h2", {}, job?.why ? `Training: ${job.why}` : "Training"),
      h(
        "ol",
        { class: "steps" },
        STEPS.map(([name, words], index) => h("li", { class: index < at ? "done" : "", "aria-current": name === phase && "step" }, words)),
      ),
      h("p", {}, NOW[phase] ?? ""),
    );
    if (phase === "training" && training.progress !== undefined) {
      parts.push(
        h("progress", { max: 1, value: training.progress, "aria-label": "Share of the training that is done" }),
        h(
          "p",
          { class: "note number" },
          `${percent(training.progress, 0)}, epoch ${training.epoch} of ${training.epochs}, loss ${training.loss.toFixed(3)}, about ${duration(training.eta_s)} left`,
        ),
      );
    }
  } else if (job) {
    parts.push(h("h2", {}, `The last training ${ENDS[job.state] ?? job.state}`), h("p", {}, job.said ?? ""), h("p", { class: "note" }, `It was started by ${job.why}, ${when(job.started_at)}.`));
  } else {
    parts.push(h("div", { class: "empty" }, h("h2", {}, "Nothing is being trained"), h("p", {}, known ? "Under Model a training can be started." : "Enter the API key to see the last one.")));
  }
  if (curves.length) parts.push(h("h3", {}, "Loss"), lineChart(curves, { steps: course.steps, title: "Loss by step" }));
  if (course.findings?.length) parts.push(h("h3", {}, "What was found in the data"), h("ul", {}, course.findings.map((one) => h("li", {}, one))));
  if (phase && !known) parts.push(h("p", { class: "note" }, "With the API key its curves and findings are shown, too."));
  return parts;
}

const ENDS = {
  finished: "has ended well",
  refused: "brought a version that the gate refused",
  failed: "has failed",
  interrupted: "was interrupted",
};
