// The page of `keras-effnet demo`: asks the models about a photo, shows what they answer and where they differ.

import { percent, showBars } from "./bars.js";
import { drawLegend, drawPhoto, strongest } from "./map.js";
import { photoInput } from "./photo_input.js";

const SIDES = ["A", "B"];
const find = (name) => document.getElementById(name);
const state = { models: [], picked: [], photo: null, answers: [], chosen: [], asked: 0 };

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
  state.picked = models.slice(0, 2);
  showPickers();
  showExamples(examples);
  drawLegend(find("legend"));
  find("opacity").addEventListener("input", () => {
    find("opacity-value").textContent = `${find("opacity").value}%`;
    drawFigures();
  });
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

const models = () => state.picked.filter(Boolean);

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
    button.addEventListener("click", async () => {
      const blob = await (await fetch(url)).blob();
      take(blob, url.split("/").pop());
    });
    return button;
  });
  find("examples").append(made("span", { className: "note" }, "Or try:"), ...buttons);
}

/* A photo */

async function take(blob, name) {
  state.photo?.bitmap.close();
  state.photo = { blob, name, bitmap: await createImageBitmap(blob) };
  await ask();
}

async function ask() {
  const asked = ++state.asked; // an answer that comes after the next question is dropped
  const { blob, name } = state.photo;
  input.tell("");
  find("results").setAttribute("aria-busy", "true");
  find("told").textContent = `Looking at ${name}`;
  try {
    if (blob.size > state.most) throw new Error(`Expected a photo of at most ${state.most / 1e6} MB. Received: more.`);
    const answers = await answersOf(blob);
    if (asked !== state.asked) return;
    state.answers = answers;
    const best = answers.map((answer) => answer.predictions[0].class_id);
    state.chosen = areComparable() ? best.map(() => best[0]) : best;
    show();
  } catch (error) {
    if (asked !== state.asked) return;
    input.tell(`${name}: ${error.message}`);
    find("told").textContent = "";
  } finally {
    if (asked === state.asked) find("results").removeAttribute("aria-busy");
  }
}

/** Each model also answers about the top 5 of the other. */
async function answersOf(blob) {
  const [first, second] = models();
  const one = await answerOf(first, blob, []);
  if (!second) return [one];
  if (!areComparable()) return [one, await answerOf(second, blob, [])];
  const other = await answerOf(second, blob, one.predictions);
  const known = new Set(one.predictions.map((row) => row.class_id));
  const missing = other.predictions.filter((row) => !known.has(row.class_id));
  if (missing.length) one.predictions = (await answerOf(first, blob, missing)).predictions;
  return [one, other];
}

async function answerOf(model, blob, also) {
  const asked = new URLSearchParams({ model: model.name, also: also.map((row) => row.class_id).join() });
  let reply;
  try {
    reply = await fetch(`classify?${asked}`, { method: "POST", body: blob });
  } catch {
    throw new Error("Expected an answer. Received: none. Is `keras-effnet demo` still running?");
  }
  const answer = await reply.json().catch(() => ({ error: `Expected an answer. Received: status ${reply.status}` }));
  if (answer.error) throw new Error(answer.error);
  return answer;
}

const areComparable = () => models().length < 2 || models()[0].classes === models()[1].classes;

/* Results */

function show() {
  const { name, bitmap } = state.photo;
  find("empty").hidden = true;
  find("answer").hidden = find("stage").hidden = false;
  find("photo-input").classList.replace("big", "small");
  find("photo-name").textContent = name;
  find("photo-size").textContent = `${bitmap.width} \u00d7 ${bitmap.height} pixels`;
  const parts = [verdicts()];
  const words = models().length === 2 ? difference() : "";
  if (words) parts.push(made("p", { id: "difference" }, words));
  parts.push(...lists(), times(), ...notes());
  find("answer").replaceChildren(...parts);
  showFigures();
  const best = state.answers.map((answer) => spoken(answer.predictions[0]));
  find("told").textContent = `${name}: ${best.join("; ")}. ${words}`;
}

const spoken = ({ name, probability }) => `${name}, ${percent(probability)}`;

function verdicts() {
  const each = state.answers.map(({ predictions: [best] }, place) => {
    const title = made("p", { className: "verdict" }, best.name, " ", made("small", {}, percent(best.probability)));
    if (state.answers.length === 1) return title;
    return made("div", {}, made("p", { className: "side" }, dot(place), models()[place].title), title);
  });
  return made("div", { className: "verdicts" }, ...each);
}

function difference() {
  if (!areComparable()) return "The models have different classes, so only each one's own list is shown.";
  const [one, other] = state.answers.map((answer) => answer.predictions);
  const isSame = one[0].class_id === other[0].class_id;
  const [first, second] = models().map((model) => model.title);
  const top = isSame ? "Same top-1" : `Different top-1: ${first} says ${one[0].name}, ${second} says ${other[0].name}`;
  const rows = pairs().map(({ name, probability: [a, b] }) => ({ name, points: 100 * Math.abs(a - b) }));
  const { name, points } = rows.reduce((most, row) => (row.points > most.points ? row : most));
  return `${top}; largest difference ${points.toFixed(1)} points at \u201c${name}\u201d.`;
}

/** The union of both top 5, in the order of A. */
function pairs() {
  const [one, other] = state.answers.map((answer) => answer.predictions);
  const ofOther = new Map(other.map((row) => [row.class_id, row]));
  return one.map(({ class_id, name, probability, rank }) => {
    const row = ofOther.get(class_id);
    const mark = rank === row.rank ? "" : `rank ${rank} in A, ${row.rank} in B`;
    return { class_id, name, probability: [probability, row.probability], mark };
  });
}

function lists() {
  const isPair = models().length === 2 && areComparable();
  const lists = isPair ? [pairs()] : state.answers.map((answer) => answer.predictions);
  return lists.map((rows, place) => {
    const element = made("div");
    const label = isPair || lists.length === 1 ? "Most likely classes" : `Most likely classes of ${models()[place].title}`;
    const fill = () =>
      showBars(element, rows, {
        label,
        models: models().map((model) => model.title),
        chosen: rows.findIndex((row) => row.class_id === state.chosen[place]),
        onChoose: (row) => {
          state.chosen = state.chosen.map((id, side) => (lists.length === 1 || side === place ? rows[row].class_id : id));
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
  state.answers.forEach(({ milliseconds: { decode, predict, runs } }, place) => {
    const term = state.models.length > 1 ? made("dt", {}, dot(place), facts(models()[place])) : made("dt", {}, "Time");
    const time = made("b", {}, `${predict.toFixed(1)} ms`);
    const median = runs > 1 ? ` (median of ${runs} runs)` : "";
    const other = ` for the model${median}, ${decode.toFixed(1)} ms to decode and crop`;
    list.append(made("div", {}, term, made("dd", {}, time, other)));
  });
  return list;
}

const notes = () =>
  models().flatMap((model) => (model.note ? [made("p", { className: "note" }, `${model.title}: ${model.note}`)] : []));

/* The photo with its maps */

const rowOf = (answer, place) => answer.predictions.find((row) => row.class_id === state.chosen[place]);

function showFigures() {
  const figures = state.answers.map((answer, place) => {
    const canvas = made("canvas");
    canvas.setAttribute("role", "img");
    const [label, caption] = words(answer, place);
    canvas.setAttribute("aria-label", label);
    return made("figure", {}, canvas, made("figcaption", {}, ...caption));
  });
  find("figures").replaceChildren(...figures);
  const hasMap = state.answers.some((answer, place) => rowOf(answer, place)?.map);
  find("map-controls").hidden = !hasMap;
  const without = models().filter((model) => model.map_note);
  find("map-note").textContent = [
    "The model sees the framed part of the photo.",
    hasMap ? "Colours show what each place adds to the chosen class. Choose another class in the list." : "",
    ...without.map((model) => `There is no map for ${model.title}: ${model.map_note}.`),
  ].join(" ");
  drawFigures();
}

function words(answer, place) {
  const row = rowOf(answer, place);
  const model = models()[place].title;
  const start = state.answers.length > 1 ? [dot(place), `${model}: `] : [];
  if (!row) return [`The photo, for ${model}`, [...start, "not among its classes in the list"]];
  const where = row.map ? `. Its map is the strongest ${strongest(row.map)}` : "";
  return [`The photo with ${row.name}, for ${model}${where}`, [...start, `${row.name}, ${percent(row.probability)}`]];
}

function drawFigures() {
  const opacity = find("opacity").value / 100;
  document.querySelectorAll("#figures canvas").forEach((canvas, place) => {
    const answer = state.answers[place];
    const { photo, crop } = answer;
    const shares = {
      top: crop.top / photo.height,
      left: crop.left / photo.width,
      height: crop.height / photo.height,
      width: crop.width / photo.width,
    };
    drawPhoto(canvas, state.photo.bitmap, shares, rowOf(answer, place)?.map ?? null, opacity);
  });
}

start().catch((error) => input.tell(error.message));
