// The model in the browser. A page of your own can import this module too; it loads the files beside it.

import { InferenceSession, Tensor, env } from "./onnxruntime/ort.wasm.bundle.min.js";
import { decode, inputOf } from "./preprocess.js";

const VERSION = ""; // of this export, which writes it here

/**
 * Loads the model of this folder.
 *
 * @param {{onProgress: (function(number): void|undefined)}} options `onProgress` gets the share of the bytes that have
 *   arrived, 0 to 1.
 * @returns {Promise<{classes: string[], examples: string[], classify: function(Blob, number=): Promise<object>}>}
 *   `examples` are the addresses of photos to try. `classify(photo, top)` resolves to `predictions`, the most likely
 *   classes (`classId`, `name`, `probability`), and `milliseconds`. It computes on the page's own thread, since a page's
 *   Content-Security-Policy does not bind a worker.
 */
export async function loadClassifier({ onProgress = () => {} } = {}) {
  const { page } = await (await request("metadata.json", { cache: "no-cache" })).json();
  if (page.version !== VERSION) {
    await fetch(import.meta.url, { cache: "reload" }).catch(() => {}); // the next load then has the newer script
    throw new Error("Expected the files of one export. Received: an older script, which the browser kept. Reload the page.");
  }
  const parts = [page.runtime, page.model];
  const whole = parts[0].bytes + parts[1].bytes;
  const arrived = [0, 0];
  const [wasm, model] = await Promise.all(
    parts.map((part, place) =>
      download(part, (bytes) => {
        arrived[place] = bytes;
        onProgress((arrived[0] + arrived[1]) / whole);
      }),
    ),
  );
  env.wasm.wasmBinary = wasm.buffer;
  env.wasm.numThreads = 1; // more need headers that servers of static files do not send (COOP, COEP)
  const session = await InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  await run(session, page, new Float32Array(page.input.shape.reduce((a, b) => a * b))); // the first run takes longer
  let turn = Promise.resolve(); // a session runs one photo at a time
  const classify = (blob, top = 5) => {
    const result = turn.then(() => classified(session, page, blob, top));
    turn = result.catch(() => {});
    return result;
  };
  return { classes: page.classes, examples: page.examples.map(address), classify };
}

async function classified(session, page, blob, top) {
  const bitmap = await decode(blob);
  const start = performance.now();
  const input = inputOf(bitmap, page.input);
  bitmap.close();
  const prepared = performance.now();
  const outputs = await run(session, page, input);
  const end = performance.now();
  // As `Classifier.ranked()`: the logits of a few classes may look like probabilities for some photos.
  const isLogits = page.logits || outputs.some((output) => output < 0 || output > 1.001);
  const probabilities = isLogits ? softmax(outputs) : outputs;
  return {
    predictions: ranked(probabilities, page.classes).slice(0, top),
    milliseconds: { preprocessing: prepared - start, model: end - prepared },
  };
}

async function run(session, page, input) {
  const [inputName] = session.inputNames;
  const results = await session.run({ [inputName]: new Tensor("float32", input, [1, ...page.input.shape]) });
  return results[session.outputNames[0]].data;
}

function softmax(logits) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

function ranked(probabilities, classes) {
  const rows = [...probabilities].map((probability, classId) => ({ classId, name: classes[classId], probability }));
  return rows.sort((a, b) => b.probability - a.probability); // stable, as Python's
}

/** Downloads a file, and tells how many bytes have arrived. */
async function download({ path, bytes, version }, onBytes) {
  const response = await request(`${path}?${version}`);
  const content = new Uint8Array(bytes);
  const reader = response.body.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > bytes) throw unlike(path, bytes, "more");
    content.set(value, filled);
    filled += value.length;
    onBytes(filled);
  }
  if (filled < bytes) throw unlike(path, bytes, filled);
  return content;
}

function unlike(path, bytes, received) {
  return new Error(`Expected ${path} of ${bytes} bytes. Received: ${received}. Upload all files of the folder again.`);
}

async function request(path, options = {}) {
  const response = await fetch(address(path), options);
  if (!response.ok) {
    throw new Error(`Expected ${path} beside this page. Received: HTTP ${response.status}. Upload all files of the folder.`);
  }
  return response;
}

function address(path) {
  return new URL(path, import.meta.url).href;
}
