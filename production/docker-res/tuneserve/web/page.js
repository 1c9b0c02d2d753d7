// The page: which view is shown, and what the server's state is. Each view is a module of its own.

import { follow, hasKey, setKey } from "./api.js";
import { askView } from "./ask.js";
import { duration, fill, h, percent } from "./dom.js";
import { labelView } from "./label.js";
import { modelView } from "./model.js";
import { trainingView } from "./training.js";

const $ = (id) => document.getElementById(id);
const NAMES = ["ask", "label", "model", "training"];
const PHASES = { preparing: "preparing", training: "training", testing: "testing", judging: "judging" };

let server = null; // the newest event
let shown = ""; // what the view was made for
let view = null; // its `parts`, and if it has them its `update` and `close`
let dismissed = "";

const trainingWords = ({ training }) => {
  const words = PHASES[training.phase];
  if (training.progress === undefined) return `${words} …`;
  return `${words}: ${percent(training.progress, 0)}, about ${duration(training.eta_s)} left`;
};

// [class, words] of the state in the header.
function stateOf({ phase, training, reason }) {
  if (phase === "ready") return training.phase ? ["ready", `ready; ${trainingWords(server)}`] : ["ready", "ready"];
  if (phase === "failed") return ["failed", "failed"];
  if (phase === "loading") return ["busy", reason ?? "loading the model …"];
  return training.phase ? ["busy", trainingWords(server)] : ["", "no model"];
}

function noticeOf({ phase, training, job, shown: known }) {
  if (phase === "failed") return ["bad-news", "failed", "The model cannot answer any more. The server’s log says why; GET /livez is red, so that whoever watches it will restart it."];
  if (!known || !job || training.phase) return null;
  const words = { refused: "The last training brought a version that the gate refused; the one before goes on answering", failed: "The last training has failed" }[job.state];
  return words && ["", job.id, `${words}: ${job.said ?? "see the log"}`];
}

function showState() {
  const [kind, words] = stateOf(server);
  $("state").className = `state ${kind}`;
  $("state").textContent = words;
  say(words.replace(/:.*/, "")); // and not each second of a training
  document.title = `${words === "ready" ? "" : `${words} – `}tuneserve`;
  const notice = noticeOf(server);
  if (!notice) {
    if ($("notice").dataset.id) fill($("notice"));
    delete $("notice").dataset.id;
  } else if (dismissed !== notice[1] && $("notice").dataset.id !== notice[1]) {
    $("notice").dataset.id = notice[1];
    const close = () => {
      dismissed = notice[1];
      fill($("notice"));
    };
    fill($("notice"), h("div", { class: `notice ${notice[0]}` }, h("p", {}, notice[2]), h("button", { type: "button", class: "quiet", onclick: close }, "Dismiss")));
  }
  $("key").hidden = !server.keyed;
  $("key").textContent = hasKey() ? (server.shown ? "Key in use" : "Key not right") : "API key";
}

function nameOfView() {
  const wanted = location.hash.slice(1);
  if (NAMES.includes(wanted)) return wanted;
  return server.phase === "ready" || !server.training.phase ? "ask" : "training"; // while the first model is trained
}

function nothingAnswers() {
  const { training, trains } = server;
  const [title, words] = training.phase
    ? ["The first model is being trained", "It will answer here as soon as it has passed its test."]
    : server.phase === "loading"
      ? ["The model is being loaded", "That takes a few seconds."]
      : server.phase === "failed"
        ? ["No model can answer", "The server’s log says why."]
        : ["There is no model yet", trains ? "The next training will bring one." : "Put one into the store: run.py train, or run.py import FOLDER."];
  const more = training.phase && h("p", {}, h("a", { href: "#training" }, "See how far it is"));
  return { parts: [h("section", { class: "empty" }, h("h2", {}, title), h("p", {}, words), more)] };
}

function showView() {
  const name = nameOfView();
  for (const link of document.querySelectorAll("nav a[href^='#']")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  // Whether there is a model, and whether the key is right, decides what a view can show.
  const made = [name, server.phase === "ready", server.shown, server.task, name === "ask" && server.phase].join();
  if (made !== shown) {
    leave();
    shown = made;
    const views = { ask: server.phase === "ready" ? askView : nothingAnswers, label: labelView, model: modelView, training: trainingView };
    view = views[name](server);
    fill($("view"), view.parts);
  }
  view.update?.(server);
}

function onEvent(event) {
  server = event;
  showState();
  showView();
}

const LOST = {
  401: ["no key", "This server wants its API key", "Enter it above."],
  404: ["many models", "Many models answer here", "How they are asked is described under API."],
  429: ["not followed", "Too many pages follow this server", "This page tries again by itself."],
};

// What a view shows stays, since it may be somebody's work: only the state tells of it.
function onLost(error) {
  const [state, title, words] = LOST[error.status] ?? ["not connected", "The server does not answer", `${error.message} This page tries again by itself.`];
  $("state").className = "state failed";
  $("state").textContent = state;
  document.title = `${state} – tuneserve`;
  say(title);
  if (error.status === 401) $("key").hidden = false;
  if (server !== null && error.status !== 401) return;
  server = null;
  leave();
  fill($("view"), h("section", { class: "empty" }, h("h2", {}, title), h("p", {}, words)));
}

function say(words) {
  if ($("said").textContent !== words) $("said").textContent = words;
}

// What a view has started ends with it.
function leave() {
  view?.close?.();
  view = null;
  shown = "";
}

function start() {
  const dialog = $("key-dialog");
  $("key").addEventListener("click", () => {
    $("key-value").value = "";
    dialog.returnValue = "";
    dialog.showModal();
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "use") return;
    setKey($("key-value").value);
    $("key-value").value = "";
    leave();
    server = null;
    follow(onEvent, onLost);
  });
  addEventListener("hashchange", () => {
    if (!server) return;
    showView();
    $("view").focus();
  });
  follow(onEvent, onLost);
}

start();
