// A photo on a canvas, with the part that the model sees, and a map over it.

// Red, green, blue and how much they cover the photo, of equal steps from nothing to the most: as `overlay()` draws.
const COLOURS = [
  [59, 15, 112, 0], [140, 41, 129, 0.5], [222, 73, 104, 0.8], [254, 159, 109, 0.95], [252, 253, 150, 1],
];
const SIDE = 160; // pixels that a map is drawn with, before the canvas stretches it
const SHORTEST = 900; // pixels of the canvas
const LONGEST = 1400;

/**
 * Draws a photo. What the model does not see is paler, what it sees has a frame.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {ImageBitmap} photo
 * @param {{top: number, left: number, height: number, width: number}} crop In shares of the photo's height and width.
 * @param {number[][]|null} map Rows of numbers, over the crop. Those below 0 are not drawn.
 * @param {number} opacity From 0 to 1.
 */
export function drawPhoto(canvas, photo, crop, map, opacity) {
  const longest = Math.max(photo.width, photo.height);
  const scale = Math.min(LONGEST, Math.max(SHORTEST, longest)) / longest;
  const width = (canvas.width = Math.round(photo.width * scale));
  const height = (canvas.height = Math.round(photo.height * scale));
  const at = [crop.left * width, crop.top * height, crop.width * width, crop.height * height];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, width, height);
  const outside = new Path2D();
  outside.rect(0, 0, width, height);
  outside.rect(...at);
  context.fillStyle = "rgb(128 128 132 / 60%)";
  context.fill(outside, "evenodd");
  if (map) {
    context.save(); // without its own colours, the photo leaves those of the map alone
    context.beginPath();
    context.rect(...at);
    context.clip();
    context.filter = `grayscale(${opacity})`;
    context.drawImage(photo, 0, 0, width, height);
    context.restore();
    context.globalAlpha = opacity;
    context.drawImage(coloured(map), ...at);
    context.globalAlpha = 1;
  }
  const line = Math.max(1, width / 400);
  context.lineWidth = line;
  context.strokeStyle = "rgb(255 255 255 / 90%)";
  context.strokeRect(at[0] + line / 2, at[1] + line / 2, at[2] - line, at[3] - line);
}

/**
 * Draws the colours of the maps from the least to the most.
 *
 * @param {HTMLCanvasElement} canvas
 */
export function drawLegend(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const [red, green, blue, cover] = colour(x / (canvas.width - 1));
    context.fillStyle = `rgb(${red} ${green} ${blue} / ${cover})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/**
 * Says where a map is the highest, for those who do not see it.
 *
 * @param {number[][]} map
 * @returns {string} As in "strongest in the upper left", or "empty" if no number is above 0.
 */
export function strongest(map) {
  let [best, row, column] = [0, -1, -1];
  map.forEach((values, y) => values.forEach((value, x) => value > best && ([best, row, column] = [value, y, x])));
  if (row < 0) return "empty";
  const third = (place, count, names) => names[Math.min(2, Math.floor((3 * (place + 0.5)) / count))];
  const vertical = third(row, map.length, ["upper", "", "lower"]);
  const horizontal = third(column, map[0].length, ["left", "", "right"]);
  return `strongest in the ${[vertical, horizontal].filter(Boolean).join(" ") || "middle"}`;
}

/** Returns a map as a picture. Its numbers are interpolated first, then coloured: the other way makes grey between. */
function coloured(map) {
  const most = Math.max(...map.flat(), Number.MIN_VALUE);
  const picture = new ImageData(SIDE, SIDE);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      const value = Math.max(0, between(map, (y + 0.5) / SIDE, (x + 0.5) / SIDE) / most);
      const [red, green, blue, cover] = colour(value);
      picture.data.set([red, green, blue, 255 * cover], 4 * (y * SIDE + x));
    }
  }
  const canvas = new OffscreenCanvas(SIDE, SIDE);
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

/** Returns a map's number at a place, bilinear between the centres of its cells. */
function between(map, vertical, horizontal) {
  const [y, top, bottom] = neighbours(vertical, map.length);
  const [x, left, right] = neighbours(horizontal, map[0].length);
  const upper = map[top][left] * (1 - x) + map[top][right] * x;
  const lower = map[bottom][left] * (1 - x) + map[bottom][right] * x;
  return upper * (1 - y) + lower * y;
}

function neighbours(share, count) {
  const place = Math.min(count - 1, Math.max(0, share * count - 0.5));
  const before = Math.floor(place);
  return [place - before, before, Math.min(count - 1, before + 1)];
}

function colour(value) {
  const place = Math.min(1, Math.max(0, value)) * (COLOURS.length - 1);
  const before = Math.min(COLOURS.length - 2, Math.floor(place));
  return COLOURS[before].map((part, channel) => part + (COLOURS[before + 1][channel] - part) * (place - before));
}
