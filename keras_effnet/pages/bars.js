// Probabilities as a list of bars, which a screen reader reads as text.

const SIDES = ["", "second"];

/**
 * Shows classes with their probabilities.
 *
 * @param {HTMLElement} element What it held is replaced.
 * @param {{name: string, probability: (number|number[]), mark: (string|undefined)}[]} rows In the order to show. Of two
 *   models, `probability` is a pair; a null in it is shown as "-". `mark` is a word beside the name.
 * @param {{label: (string|undefined), models: (string[]|undefined), chosen: (number|undefined),
 *   onChoose: (function(number): void|undefined)}} options `label` names the list. `models` names the two of a pair. With
 *   `onChoose`, each row is a button; `chosen` is the row that is pressed.
 */
export function showBars(element, rows, { label = "Classes", models = [], chosen = -1, onChoose } = {}) {
  const list = document.createElement("ol");
  list.className = "bars";
  list.setAttribute("aria-label", label);
  rows.forEach((row, place) => list.append(item(row, place, { models, chosen, onChoose })));
  element.replaceChildren(list);
}

/**
 * Says a probability, as in "12.3%".
 *
 * @param {number} probability From 0 to 1.
 * @returns {string}
 */
export function percent(probability) {
  return probability.toLocaleString("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
}

/**
 * Returns a name as an element. One that is written from right to left does not move what stands beside it.
 *
 * @param {string} name
 * @returns {HTMLElement}
 */
export function isolated(name) {
  return Object.assign(document.createElement("bdi"), { textContent: name });
}

function item({ name, probability, mark }, place, { models, chosen, onChoose }) {
  const probabilities = [probability].flat();
  const row = document.createElement(onChoose ? "button" : "div");
  row.className = probabilities.length > 1 ? "bars-row several" : "bars-row";
  if (onChoose) {
    row.type = "button";
    row.setAttribute("aria-pressed", String(place === chosen));
    row.addEventListener("click", () => onChoose(place));
  }
  const title = span("bars-name", "");
  title.append(isolated(name));
  if (mark) title.append(" ", span("bars-mark", mark));
  row.append(title);
  const isAlone = probabilities.length === 1;
  probabilities.forEach((value, side) => {
    const said = value === null ? "-" : percent(value);
    const told = span("bars-value", said);
    if (!isAlone) told.prepend(span("hidden-text", `${models[side] ?? ""} `));
    // Beside one bar, the number is in the line of the name.
    row.append(...(isAlone ? [told, bar(value, side, true)] : [bar(value, side, false), told]));
  });
  const entry = document.createElement("li");
  entry.append(row);
  return entry;
}

/** A picture of the number that stands beside it as text, so a screen reader skips it. */
function bar(value, side, isWide) {
  const track = span(`bar ${SIDES[side]}`, "");
  track.setAttribute("aria-hidden", "true");
  if (isWide) track.style.gridColumn = "1 / -1";
  const filled = document.createElement("span");
  filled.style.width = `${100 * (value ?? 0)}%`;
  track.append(filled);
  return track;
}

function span(name, text) {
  return Object.assign(document.createElement("span"), { className: name.trim(), textContent: text });
}
