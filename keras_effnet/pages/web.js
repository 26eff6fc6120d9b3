// The page of `keras-effnet export --format web`: photos in, classes out.

import { isolated, showBars } from "./bars.js";
import { loadClassifier } from "./classifier.js";
import { photoInput } from "./photo_input.js";

const part = (id) => document.getElementById(id);

part("not-started").remove();
part("main").hidden = false;
const input = photoInput(part("photo"), { onPhoto: show });
const loading = loadClassifier({
  onProgress(share) {
    part("progress").value = share;
    part("loaded").textContent = `${Math.floor(100 * share)} %`;
  },
});

let last = 0; // number of the photo that the page shows: results of earlier ones come too late

/** Shows a photo, and its classes once the model has loaded. */
async function show({ blob, name, bitmap }) {
  const turn = ++last;
  bitmap.close(); // the model has a decoder of its own
  preview(blob, name);
  part("error").textContent = "";
  part("result").replaceChildren();
  part("status").textContent = `${name} is classified as soon as the model has loaded.`;
  try {
    const { classify } = await loading;
    if (turn !== last) return;
    part("status").textContent = `Classifying ${name} ...`;
    await painted();
    const { predictions, milliseconds } = await classify(blob);
    if (turn !== last) return;
    const whole = milliseconds.preprocessing + milliseconds.model;
    showBars(part("result"), predictions, { label: `Most likely classes of ${name}` });
    const best = isolated(predictions[0].name);
    part("status").replaceChildren(isolated(name), ": ", best, `. ${Math.round(whole)} ms on this computer.`);
  } catch (error) {
    if (turn === last) fail(error);
  }
}

function preview(blob, name) {
  const image = part("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  image.alt = `Your photo ${name}`;
  part("shown").hidden = false;
}

/** Waits until the page shows its last change: classifying holds it up. */
function painted() {
  // A page in the background paints nothing.
  return new Promise((done) => (document.hidden ? done() : requestAnimationFrame(() => setTimeout(done))));
}

function fail(error) {
  part("status").textContent = "";
  part("error").textContent = error.message;
}

function addExample(address) {
  const name = decodeURIComponent(address.split("/").pop());
  const button = document.createElement("button");
  button.type = "button";
  const image = Object.assign(document.createElement("img"), { src: address, alt: "", width: 300, height: 200 });
  button.append(image, name);
  button.addEventListener("click", () => input.load(address));
  part("examples").append(button);
}

try {
  const { examples } = await loading;
  part("loading").hidden = true;
  examples.forEach(addExample);
  if (!last) part("status").textContent = "Ready. Choose a photo.";
} catch (error) {
  part("loading").hidden = true;
  fail(error);
}
