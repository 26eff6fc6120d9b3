// The page of `keras-effnet demo`: asks the models about a photo, shows what they answer and where they differ.

import { isolated, percent, showBars } from "./bars.js";
import { drawLegend, drawPhoto, strongest } from "./map.js";
import { photoInput } from "./photo_input.js";

const SIDES = ["A", "B"];
const find = (name) => document.getElementById(name);
// `photo` and `picked` belong to the question, `shown` ({photo, models, answers, chosen}) to the last that was answered.
const state = { models: [], picked: [], photo: null, shown: null, asking: new AbortController() };

const input = photoInput(find("photo-input"), { onPhoto: take });

function made(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function start() {
  const { models, examples, most_bytes } = await (await fetch("models")).json();
  Object.assign(state, { models, most: most_bytes });
  for (const model of models) model.title = titleOf(model.name);
  find("where").textContent = `keras_effnet, ${where(location.hostname)}`;
  state.picked = models.slice(0, 2);
  showPickers();
  showExamples(examples);
  drawLegend(find("legend"));
  find("opacity").addEventListener("input", () => {
    find("opacity-value").textContent = `${find("opacity").value}%`;
    drawFigures();
  });
}

function where(host) {
  const isHere = /^(localhost|127\..*|\[::1\])$/.test(host);
  return isHere ? "on this computer: photos do not leave it." : `photos are sent to ${host}, which runs the model.`;
}

/* Models */

function showPickers() {
  if (state.models.length === 1) {
    find("pickers").append(made("p", { className: "side" }, facts(state.models[0])));
    return;
  }
  const pickers = SIDES.map((side, place) => {
    const select = made("select", { id: `model-${side}` });
    select.append(...state.models.map((model) => new Option(model.title, model.name)));
    if (place) select.append(new Option("no second model", ""));
    select.value = state.picked[place].name;
    select.addEventListener("change", () => {
      state.picked[place] = state.models.find((model) => model.name === select.value);
      if (state.photo) ask();
    });
    return made("label", { className: "picker" }, made("span", {}, dot(place), `Model ${side}`), select);
  });
  find("pickers").append(...pickers);
}

/** Returns the end of a path, unless two models have the same. */
function titleOf(name) {
  const last = (path) => path.replace(/\/+$/, "").split("/").pop();
  return state.models.filter((model) => last(model.name) === last(name)).length > 1 ? name : last(name);
}

function facts({ title, size, precision, runtime }) {
  const [height, width] = size;
  return `${title} \u00b7 ${width} \u00d7 ${height} pixels \u00b7 ${precision} \u00b7 ${runtime}`;
}

function dot(place) {
  const mark = made("span", { className: place ? "dot second" : "dot" });
  mark.setAttribute("aria-hidden", "true");
  return mark;
}

function showExamples(examples) {
  const buttons = examples.map(({ name, url }) => {
    const picture = made("img", { src: url, alt: "", width: 52, height: 52 });
    const button = made("button", { type: "button", className: "example" }, picture, name);
    button.addEventListener("click", () => input.load(url));
    return button;
  });
  find("examples").append(made("span", { className: "note" }, "Or try:"), ...buttons);
}

/* A photo */

function take(photo) {
  const old = state.photo;
  state.photo = photo;
  closeUnused(old);
  ask();
}

function closeUnused(photo) {
  if (photo && photo !== state.photo && photo !== state.shown?.photo) photo.bitmap.close();
}

async function ask() {
  state.asking.abort(); // the answer to an earlier question is not shown
  const { signal } = (state.asking = new AbortController());
  const { photo } = state;
  const { blob, name } = photo;
  const models = state.picked.filter(Boolean);
  input.tell("");
  find("results").setAttribute("aria-busy", "true");
  find("told").textContent = `Looking at ${name}`;
  try {
    if (blob.size > state.most) throw new Error(`Expected a photo of at most ${state.most / 1e6} MB. Received: more.`);
    const answers = await answersOf(models, blob, signal);
    if (signal.aborted) return;
    const old = state.shown?.photo;
    const best = answers.map((answer) => answer.predictions[0].class_id);
    state.shown = { photo, models, answers, chosen: areComparable(models) ? best.map(() => best[0]) : best };
    closeUnused(old);
    show();
  } catch (error) {
    if (signal.aborted) return;
    state.photo = state.shown?.photo ?? null; // the next question is about what the page shows
    closeUnused(photo);
    input.tell(`${name}: ${error.message}`);
    find("told").textContent = "";
  } finally {
    if (!signal.aborted) find("results").removeAttribute("aria-busy");
  }
}

/** Each model also answers about the top 5 of the other. */
async function answersOf(models, blob, signal) {
  const [first, second] = models;
  const one = await answerOf(first, blob, [], signal);
  if (!second) return [one];
  if (!areComparable(models)) return [one, await answerOf(second, blob, [], signal)];
  const other = await answerOf(second, blob, one.predictions, signal);
  const known = new Set(one.predictions.map((row) => row.class_id));
  const missing = other.predictions.filter((row) => !known.has(row.class_id));
  if (missing.length) one.predictions = (await answerOf(first, blob, missing, signal)).predictions;
  return [one, other];
}

async function answerOf(model, blob, also, signal) {
  const asked = new URLSearchParams({ model: model.name, also: also.map((row) => row.class_id).join() });
  let reply;
  try {
    reply = await fetch(`classify?${asked}`, { method: "POST", body: blob, signal });
  } catch {
    throw new Error("Expected an answer. Received: none. Is `keras-effnet demo` still running?");
  }
  const answer = await reply.json().catch(() => ({ error: `Expected an answer. Received: status ${reply.status}` }));
  if (answer.error) throw new Error(answer.error);
  return answer;
}

const areComparable = ([first, second]) => !second || first.classes === second.classes;

/* Results */

function show() {
  const { photo, answers } = state.shown;
  const { name, bitmap } = photo;
  find("empty").hidden = true;
  find("answer").hidden = find("stage").hidden = false;
  find("photo-input").classList.replace("big", "small");
  find("photo-name").textContent = name;
  find("photo-size").textContent = `${bitmap.width} \u00d7 ${bitmap.height} pixels`;
  const parts = [verdicts()];
  if (answers.length === 2) parts.push(made("p", { id: "difference" }, ...difference()));
  parts.push(...lists(), times(), ...notes());
  find("answer").replaceChildren(...parts);
  showFigures();
  const best = answers.map((answer) => spoken(answer.predictions[0]));
  find("told").textContent = `${name}: ${best.join("; ")}. ${find("difference")?.textContent ?? ""}`;
}

const spoken = ({ name, probability }) => `${name}, ${percent(probability)}`;

function verdicts() {
  const { models, answers } = state.shown;
  const each = answers.map(({ predictions: [best] }, place) => {
    const probability = made("small", {}, percent(best.probability));
    const title = made("p", { className: "verdict" }, isolated(best.name), " ", probability);
    if (answers.length === 1) return title;
    return made("div", {}, made("p", { className: "side" }, dot(place), models[place].title), title);
  });
  return made("div", { className: "verdicts" }, ...each);
}

/** Returns the parts of a sentence about two models. */
function difference() {
  const { models, answers } = state.shown;
  if (!areComparable(models)) return ["The models have different classes, so only each one's own list is shown."];
  const [one, other] = answers.map((answer) => answer.predictions[0]);
  const [first, second] = models.map((model) => model.title);
  const top =
    one.class_id === other.class_id
      ? ["Same top-1"]
      : [`Different top-1: ${first} says `, isolated(one.name), `, ${second} says `, isolated(other.name)];
  const rows = pairs().map(({ name, probability: [a, b] }) => ({ name, points: 100 * Math.abs(a - b) }));
  const { name, points } = rows.reduce((most, row) => (row.points > most.points ? row : most));
  return [...top, `; largest difference ${points.toFixed(1)} points at \u201c`, isolated(name), "\u201d."];
}

/** The union of both top 5, in the order of A. */
function pairs() {
  const [one, other] = state.shown.answers.map((answer) => answer.predictions);
  const ofOther = new Map(other.map((row) => [row.class_id, row]));
  return one.map(({ class_id, name, probability, rank }) => {
    const row = ofOther.get(class_id);
    const mark = rank === row.rank ? "" : `rank ${rank} in A, ${row.rank} in B`;
    return { class_id, name, probability: [probability, row.probability], mark };
  });
}

function lists() {
  const { shown } = state;
  const { models, answers } = shown;
  const isPair = models.length === 2 && areComparable(models);
  const lists = isPair ? [pairs()] : answers.map((answer) => answer.predictions);
  return lists.map((rows, place) => {
    const element = made("div");
    const label = isPair || lists.length === 1 ? "Most likely classes" : `Most likely classes of ${models[place].title}`;
    const fill = () =>
      showBars(element, rows, {
        label,
        models: models.map((model) => model.title),
        chosen: rows.findIndex((row) => row.class_id === shown.chosen[place]),
        onChoose: (row) => {
          shown.chosen = shown.chosen.map((id, side) => (lists.length === 1 || side === place ? rows[row].class_id : id));
          fill();
          element.querySelectorAll("button")[row].focus();
          showFigures();
        },
      });
    fill();
    return element;
  });
}

function times() {
  const list = made("dl", { className: "times" });
  const { models, answers } = state.shown;
  answers.forEach(({ milliseconds: { decode, predict, runs } }, place) => {
    const model = models[place];
    const term = state.models.length > 1 ? made("dt", {}, dot(place), facts(model)) : made("dt", {}, "Time");
    const time = made("b", {}, `${predict.toFixed(1)} ms`);
    const map = model.timed_with_map ? " with its map" : "";
    const median = runs > 1 ? ` (median of ${runs} runs)` : "";
    const other = ` for the model${map}${median}, ${decode.toFixed(1)} ms to decode and crop`;
    list.append(made("div", {}, term, made("dd", {}, time, other)));
  });
  return list;
}

const notes = () =>
  state.shown.models
    .filter((model) => model.note)
    .map((model) => made("p", { className: "note" }, `${model.title}: ${model.note}`));

/* The photo with its maps */

const rowOf = (answer, place) => answer.predictions.find((row) => row.class_id === state.shown.chosen[place]);

function showFigures() {
  const { models, answers } = state.shown;
  const figures = answers.map((answer, place) => {
    const canvas = made("canvas");
    canvas.setAttribute("role", "img");
    const [label, caption] = words(answer, place);
    canvas.setAttribute("aria-label", label);
    return made("figure", {}, canvas, made("figcaption", {}, ...caption));
  });
  find("figures").replaceChildren(...figures);
  const hasMap = answers.some((answer, place) => rowOf(answer, place)?.map);
  find("map-controls").hidden = !hasMap;
  const without = models.filter((model) => model.map_note);
  find("map-note").textContent = [
    "The model sees the framed part of the photo.",
    hasMap ? "Colors show what each place adds to the chosen class. Choose another class in the list." : "",
    ...without.map((model) => `There is no map for ${model.title}: ${model.map_note}.`),
  ].join(" ");
  drawFigures();
}

function words(answer, place) {
  const row = rowOf(answer, place);
  const { models } = state.shown;
  const model = models[place].title;
  const start = models.length > 1 ? [dot(place), `${model}: `] : [];
  if (!row) return [`The photo, for ${model}`, [...start, "not in this model's list"]];
  const where = row.map ? `. Its map is ${strongest(row.map)}` : "";
  return [`The photo with ${row.name}, for ${model}${where}`, [...start, isolated(row.name), `, ${percent(row.probability)}`]];
}

function drawFigures() {
  const opacity = find("opacity").value / 100;
  document.querySelectorAll("#figures canvas").forEach((canvas, place) => {
    const { photo: { bitmap }, answers } = state.shown;
    const answer = answers[place];
    const { photo, crop } = answer;
    const shares = {
      top: crop.top / photo.height,
      left: crop.left / photo.width,
      height: crop.height / photo.height,
      width: crop.width / photo.width,
    };
    drawPhoto(canvas, bitmap, shares, rowOf(answer, place)?.map ?? null, opacity);
  });
}

start().catch((error) => input.tell(error.message));
