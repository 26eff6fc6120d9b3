// Photos as the model expects them: what images/decoding.py and images/resizing.py compute, step by step.
// tests/inference/test_web_export.py compares both.

const { fround } = Math;
const STRIP = 1 << 20; // pixels that a canvas holds at a time: phones refuse canvases of more than 16 million

/**
 * Returns the model's input for a photo.
 *
 * @param {ImageBitmap} bitmap See `decode()`.
 * @param {object} expected `size` (height and width), `channels`, `channelsLast`, `cropPadding` (null: an eighth),
 *   `interpolation` and `cropMode`.
 * @returns {Float32Array} Pixels, nominally 0-255.
 */
export function inputOf(bitmap, expected) {
  const { size, channels, channelsLast, interpolation } = expected;
  const window = cropWindow([bitmap.height, bitmap.width], expected);
  const pixels = read(bitmap, window, channels);
  const resized = resize(pixels, window.slice(2), channels, size, interpolation);
  return channelsLast ? resized : channelsFirst(resized, channels);
}

/**
 * Decodes a photo: turned as its EXIF orientation says, without a conversion of its colours.
 *
 * @param {Blob} blob
 * @returns {Promise<ImageBitmap>}
 */
export function decode(blob) {
  return createImageBitmap(blob, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
    premultiplyAlpha: "none",
  });
}

/** Returns a part of a photo, (height, width, channels). Transparency is put on white. */
function read(bitmap, [top, left, height, width], channels) {
  const pixels = new Uint8Array(height * width * channels);
  const rows = Math.min(height, Math.max(1, Math.floor(STRIP / width)));
  const canvas = new OffscreenCanvas(width, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.imageSmoothingEnabled = false;
  for (let start = 0; start < height; start += rows) {
    const count = Math.min(rows, height - start);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, left, top + start, width, count, 0, 0, width, count);
    const { data } = context.getImageData(0, 0, width, count);
    pixels.set(ofChannels(data, channels), start * width * channels);
  }
  return pixels;
}

/**
 * Converts red, green, blue and alpha to the model's channels. Gray as Pillow computes it: ITU-R 601-2, in 16 bits.
 *
 * @param {Uint8ClampedArray} data
 * @param {number} channels 1 or 3.
 * @returns {Uint8Array}
 */
export function ofChannels(data, channels) {
  const count = data.length / 4;
  const made = new Uint8Array(count * channels);
  for (let place = 0; place < count; place++) {
    const [red, green, blue] = [data[4 * place], data[4 * place + 1], data[4 * place + 2]];
    if (channels === 1) {
      made[place] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
    } else {
      made[3 * place] = red;
      made[3 * place + 1] = green;
      made[3 * place + 2] = blue;
    }
  }
  return made;
}

/**
 * Returns the part of a photo that is kept, as `crop_window()` does.
 *
 * @param {number[]} shape Height and width of the photo.
 * @param {object} expected See `inputOf()`.
 * @returns {number[]} Top, left, height and width.
 */
export function cropWindow([rows, columns], { size: [height, width], cropPadding, cropMode }) {
  const side = Math.min(height, width);
  const padding = cropPadding ?? Math.round(side * (1 / 0.875 - 1));
  const fraction = fround(side / (side + padding));
  const whole =
    cropMode === "center"
      ? [Math.min(rows, (columns * height) / width), Math.min(columns, (rows * width) / height)]
      : [rows, columns];
  // In float32, as in the original.
  const [keptRows, keptColumns] = whole.map((length) => Math.max(1, Math.trunc(fround(fraction * fround(length)))));
  const before = (all, kept) => Math.floor((all - kept + 1) / 2);
  return [before(rows, keptRows), before(columns, keptColumns), keptRows, keptColumns];
}

/**
 * Resizes as `resize()` does: rows first, then columns.
 *
 * @param {Uint8Array} pixels (height, width, channels).
 * @param {number[]} shape Height and width.
 * @param {number} channels
 * @param {number[]} size Height and width of the result.
 * @param {string} interpolation Key of `TAPS`.
 * @returns {Float32Array} (height, width, channels).
 */
export function resize(pixels, [rows, columns], channels, [height, width], interpolation) {
  const down = tapsOf(interpolation, rows, height);
  const across = tapsOf(interpolation, columns, width);
  const made = new Float32Array(height * width * channels);
  const line = new Float32Array(columns * channels);
  for (let y = 0; y < height; y++) {
    line.fill(0);
    for (const [index, weight] of down[y]) {
      const start = index * columns * channels;
      for (let place = 0; place < line.length; place++) line[place] += weight * pixels[start + place];
    }
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = 0;
        for (const [index, weight] of across[x]) sum += weight * line[index * channels + channel];
        made[(y * width + x) * channels + channel] = sum;
      }
    }
  }
  return made;
}

/** Returns for each output pixel the pairs of an input pixel and its weight. */
function tapsOf(interpolation, length, out) {
  const taps = TAPS[interpolation];
  const inside = (index) => Math.min(Math.max(index, 0), length - 1);
  const scale = fround(fround(length) / fround(out));
  return Array.from({ length: out }, (_, place) => {
    const { first, weights } = taps(place, scale);
    return weights.map((weight, step) => [inside(first + step), weight]);
  });
}

const TAPS = { bicubic, bilinear, "half-pixel-bilinear": halfPixel };

/** TensorFlow's legacy bicubic resize: a = -0.75, a table of 1024 steps. */
function bicubic(place, scale) {
  const where = fround(place * scale);
  const first = Math.floor(where);
  const near = roundHalfToEven((where - first) * 1024) / 1024;
  return { first: first - 1, weights: [outer(near), inner(near), inner(1 - near), outer(1 - near)] };
}

const A = -0.75;

function inner(x) {
  return ((A + 2) * x - (A + 3)) * x * x + 1;
}

function outer(x) {
  const far = x + 1;
  return ((A * far - 5 * A) * far + 8 * A) * far - 4 * A;
}

/** NumPy's `rint()`. */
function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}

/** TensorFlow's legacy bilinear resize. */
function bilinear(place, scale) {
  const where = fround(place * scale);
  const first = Math.floor(where);
  return { first, weights: [1 - (where - first), where - first] };
}

/** TensorFlow 2's bilinear resize. */
function halfPixel(place, scale) {
  const where = fround(fround((place + 0.5) * scale) - 0.5);
  const first = Math.floor(where);
  return { first, weights: [1 - (where - first), where - first] };
}

function channelsFirst(pixels, channels) {
  const count = pixels.length / channels;
  const made = new Float32Array(pixels.length);
  for (let place = 0; place < pixels.length; place++) {
    made[(place % channels) * count + Math.floor(place / channels)] = pixels[place];
  }
  return made;
}
