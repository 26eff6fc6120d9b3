// A place for a photo: drop it on the page, paste it, choose a file, or take it with a camera.

/**
 * Makes an element the photo input of its page.
 *
 * A photo may be dropped or pasted anywhere on the page. What is no image is told in the element, in one line. Of two
 * photos, the one that was given last counts, also if the other takes longer to read.
 *
 * @param {HTMLElement} element Empty. It gets the class `photo-input`, and buttons and text inside.
 * @param {{onPhoto: function({blob: Blob, name: string, bitmap: ImageBitmap}): void}} options `onPhoto` gets each photo
 *   that the browser can show, and closes its `bitmap`.
 * @returns {{tell: function(string): void, load: function(string): Promise<void>}} `tell("")` removes the error that is
 *   shown, `tell(text)` shows another. `load(address)` gives a photo of this server, as if the user had chosen it.
 */
export function photoInput(element, { onPhoto }) {
  const choose = made("button", { type: "button", className: "main", textContent: "Choose a photo" });
  const photograph = made("button", { type: "button", textContent: "Take a photo", hidden: true });
  const file = made("input", { type: "file", accept: "image/*", hidden: true });
  const capture = made("input", { type: "file", accept: "image/*", hidden: true });
  capture.setAttribute("capture", "environment");
  const hint = made("p", { className: "photo-hint", textContent: "or drop it anywhere on this page, or paste it" });
  const error = made("p", { className: "error" });
  error.setAttribute("role", "alert");
  const buttons = made("div", { className: "row" });
  buttons.append(choose, photograph, file, capture);
  element.classList.add("photo-input");
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", "Photo");
  element.append(icon(), buttons, hint, error);

  const tell = (text) => (error.textContent = text);
  let last = 0; // number of the photo that was given last
  const give = async (name, find) => {
    const turn = ++last;
    try {
      const blob = await find();
      const bitmap = await decoded(blob, name);
      if (turn !== last) return bitmap.close();
      tell("");
      onPhoto({ blob, name, bitmap });
    } catch (error) {
      if (turn === last) tell(error.message);
    }
  };
  const take = ([blob]) => blob && give(blob.name || "photo", () => blob);
  const load = (address) => give(decodeURIComponent(address.split("/").pop()), () => fetched(address));

  choose.addEventListener("click", () => file.click());
  for (const input of [file, capture]) {
    input.addEventListener("change", () => {
      take([...input.files]);
      input.value = ""; // the same file may be chosen again
    });
  }
  listen(element, take, tell);
  offerCamera(photograph, capture, take, tell);
  return { tell, load };
}

function made(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

/** A picture with a sun and hills. */
function icon() {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "photo-icon");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", "M6 3h12a3 3 0 0 1 3 3v12a3 3 0 0 1-3 3H6a3 3 0 0 1-3-3V6a3 3 0 0 1 3-3zM3 17l5-5 4 4 3-3 6 6M15.5 9h.01");
  for (const [name, value] of [["fill", "none"], ["stroke", "currentColor"], ["stroke-width", "1.4"]]) path.setAttribute(name, value);
  for (const name of ["stroke-linecap", "stroke-linejoin"]) path.setAttribute(name, "round");
  svg.append(path);
  return svg;
}

async function decoded(blob, name) {
  try {
    return await createImageBitmap(blob);
  } catch {
    throw new Error(
      blob.type.startsWith("image/")
        ? `Expected a picture that this browser can show. Received: ${name}. Save it as JPEG or PNG.`
        : `Expected a picture (JPEG, PNG, WebP, ...). Received: ${name}, which is none.`,
    );
  }
}

async function fetched(address) {
  const reply = await fetch(address).catch(() => null);
  if (reply?.ok) return reply.blob();
  const received = reply ? `status ${reply.status}` : "no answer. Is the server still running?";
  throw new Error(`Expected a photo at ${address}. Received: ${received}`);
}

/** Takes what is dropped or pasted. A browser opens a file that is dropped beside a small zone, so all of the page is one. */
function listen(element, take, tell) {
  let depth = 0; // an element inside the page ends and begins a drag as well
  const isOver = (change) => {
    depth = Math.max(0, depth + change);
    element.classList.toggle("over", depth > 0);
  };
  document.addEventListener("dragenter", () => isOver(1));
  document.addEventListener("dragleave", () => isOver(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    isOver(-depth);
    const files = [...event.dataTransfer.files];
    if (files.length) take(files);
    else tell("Expected the file of a picture. Received: something else, which cannot be read. Save the picture first.");
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) take(files);
    else tell("Expected a picture in the clipboard. Received: text.");
  });
}

/** Shows the button for the camera where there is one. A phone has a program of its own for that. */
async function offerCamera(button, capture, take, tell) {
  if (matchMedia("(pointer: coarse)").matches) {
    button.hidden = false;
    button.addEventListener("click", () => capture.click());
    return;
  }
  const devices = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? [];
  if (!devices.some((device) => device.kind === "videoinput")) return;
  button.hidden = false;
  let isOpen = false; // also while the browser asks for permission
  button.addEventListener("click", async () => {
    if (isOpen) return;
    isOpen = true;
    try {
      take([await photographed()]);
    } catch (error) {
      tell(`Expected a camera that this page may use. Received: ${error.message}`);
    } finally {
      isOpen = false;
    }
  });
}

/** Shows what the camera sees. Resolves to the photo, or to null if it was cancelled. */
async function photographed() {
  const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  const dialog = made("dialog", { className: "photo-camera" });
  dialog.setAttribute("aria-label", "Camera");
  const video = made("video", { autoplay: true, muted: true, playsInline: true, srcObject: stream });
  const shoot = made("button", { type: "button", className: "main", textContent: "Take the photo", disabled: true });
  const cancel = made("button", { type: "button", textContent: "Cancel" });
  const buttons = made("div", { className: "row" });
  buttons.append(shoot, cancel);
  dialog.append(video, buttons);
  document.body.append(dialog);
  dialog.showModal();
  video.addEventListener("loadeddata", () => {
    shoot.disabled = false;
    shoot.focus();
  });
  const isTaken = await new Promise((done) => {
    shoot.addEventListener("click", () => done(true));
    cancel.addEventListener("click", () => done(false));
    dialog.addEventListener("cancel", () => done(false)); // Escape
  });
  const canvas = made("canvas", { width: video.videoWidth, height: video.videoHeight });
  if (isTaken) canvas.getContext("2d").drawImage(video, 0, 0);
  for (const track of stream.getTracks()) track.stop();
  dialog.close(); // it gives the focus back
  dialog.remove();
  return isTaken ? new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.95)) : null;
}
