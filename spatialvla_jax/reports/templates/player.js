"use strict";
// Plays the episodes of a dataset: pictures, depth, point cloud, and curves of actions and state with a cursor.

/** Blue (near) to yellow (far). */
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const colour = (t) => COLOURS.reduce((sum, rgb, i) =>
  sum.map((s, c) => s + rgb[c] * Math.max(0, 1 - Math.abs(4 * t - i))), [0, 0, 0]);
const short = (x) => (x && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(1)
  : String(Number(x.toPrecision(3)))).replaceAll("-", "−");
const PLOT = { left: 54, right: 256, top: 8, bottom: 66 };  // of a curve's axes, in its own units

async function pixels(source, side) {
  const image = new Image(), context = new OffscreenCanvas(side, side).getContext("2d");
  image.src = source;
  await image.decode();
  context.drawImage(image, 0, 0, side, side);
  return context.getImageData(0, 0, side, side).data;
}

/** Metres from a map's grey levels; 0 for no reading. */
async function readDepth({ near, far, maps }, i, side) {
  const grey = await pixels(maps[i], side);
  return Float32Array.from({ length: side * side }, (_, p) =>
    grey[4 * p] && near + (grey[4 * p] - 1) / 254 * (far - near));
}

function drawDepth(canvas, depth, side, { near, far }) {
  const small = new OffscreenCanvas(side, side), image = new ImageData(side, side);
  depth.forEach((z, p) =>
    image.data.set(z ? [...colour((z - near) / Math.max(far - near, 1e-6)), 255] : [0, 0, 0, 255], 4 * p));
  small.getContext("2d").putImageData(image, 0, 0);
  canvas.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
}

/** The cloud without perspective, turned about its centre; a bar gives the scale. */
function drawCloud(canvas, depth, rgb, side, camera, [yaw, pitch]) {
  const [fx, fy, cx, cy] = camera.map((x) => x * side), { width, height } = canvas;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const nearest = new Float32Array(width * height).fill(Infinity), seen = depth.filter((z) => z).sort();
  const middle = seen[seen.length >> 1] || 1, zoom = 0.6 * fx / side * width / middle;
  depth.forEach((d, p) => {
    if (!d) return;
    let x = (p % side + 0.5 - cx) / fx * d, y = (Math.floor(p / side) + 0.5 - cy) / fy * d, z = d - middle;
    [x, z] = [x * Math.cos(yaw) + z * Math.sin(yaw), z * Math.cos(yaw) - x * Math.sin(yaw)];
    [y, z] = [y * Math.cos(pitch) + z * Math.sin(pitch), z * Math.cos(pitch) - y * Math.sin(pitch)];
    const u = Math.round(width / 2 + zoom * x), v = Math.round(height / 2 + zoom * y);
    const radius = Math.ceil(zoom * d / fx / 2);
    for (let b = Math.max(0, v - radius); b <= Math.min(height - 1, v + radius); b++)
      for (let a = Math.max(0, u - radius); a <= Math.min(width - 1, u + radius); a++)
        if (z < nearest[b * width + a]) {
          nearest[b * width + a] = z;
          image.data.set([rgb[4 * p], rgb[4 * p + 1], rgb[4 * p + 2], 255], 4 * (b * width + a));
        }
  });
  context.putImageData(image, 0, 0);
  const metres = [2, 1, 0.5, 0.2, 0.1, 0.05, 0.02].find((m) => m * zoom < width / 3) ?? 0.01;
  context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = 2;
  context.strokeRect(10, height - 10, metres * zoom, 0);
  context.font = "13px system-ui, sans-serif";
  context.fillText(`${metres} m`, 10, height - 16);
}

/** A curve over the steps; `null` is a gap. */
function curve(name, steps, values) {
  const known = values.filter((y) => y !== null), low = Math.min(...known), high = Math.max(...known);
  const { left, right, top, bottom } = PLOT, last = Math.max(steps[steps.length - 1], 2);
  const x = (step) => (left + (step - 1) / (last - 1) * (right - left)).toFixed(1);
  const y = (value) => (high > low ? bottom - (value - low) / (high - low) * (bottom - top) : (top + bottom) / 2).toFixed(1);
  const path = values.map((value, i) =>
    value === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${x(steps[i])} ${y(value)}`).join("");
  const figure = document.createElement("figure");
  const level = (value) => `<text x="${left - 4}" y="${+y(value) + 3}" text-anchor="end">${short(value)}</text>`;
  figure.innerHTML = `<svg viewBox="0 0 260 82" role="img"><path class="axis" d="M${left} ${top}V${bottom}H${right}"/>` +
    `<path class="curve" d="${path}"/><path class="now" d=""/>${known.length ? level(high) : ""}` +
    `${high > low ? level(low) : ""}<text x="${left}" y="${bottom + 13}">1</text>` +
    `<text x="${right}" y="${bottom + 13}" text-anchor="end">step ${last}</text></svg><figcaption><b></b> <span></span></figcaption>`;
  figure.querySelector("b").textContent = name;
  figure.move = (step) => {
    const at = Math.max(0, steps.findLastIndex((one) => one <= step));
    figure.querySelector(".now").setAttribute("d", `M${x(step)} ${top}V${bottom}`);
    figure.querySelector("span").textContent = values[at] === null ? "no number" : short(values[at]);
  };
  return figure;
}

function startPlayer(player) {
  const find = (selector) => player.querySelector(selector);
  const { episodes, dimensions } = JSON.parse(find("script").textContent);
  const side = 64, slider = find("[type=range]"), button = find("button");
  let episode, curves, cloud, timer, turn = [-0.5, 0.35], shown = 0;

  const turned = () => cloud && drawCloud(find(".cloud"), ...cloud, turn);
  const stop = () => { clearInterval(timer); timer = undefined; button.textContent = "Play"; };

  async function show() {
    const i = Number(slider.value), number = ++shown, { depth } = episode;
    find("img").src = episode.images[i];
    find("output").textContent = `step ${episode.shown[i]} of ${episode.length}`;
    curves.forEach((one) => one.move(episode.shown[i]));
    const read = depth && await Promise.all([readDepth(depth, i, side), pixels(episode.images[i], side)]);
    if (number !== shown) return;  // another frame was chosen meanwhile
    if (depth) {
      drawDepth(find(".depth"), read[0], side, depth);
      cloud = [read[0], read[1], side, episode.camera];
      turned();
    }
    player.dataset.step = episode.shown[i];
  }

  function choose() {
    stop();
    episode = episodes[find("select").value];
    const { depth, action, state, steps, images } = episode;
    slider.max = images.length - 1;
    slider.value = 0;
    player.querySelectorAll(".with-depth").forEach((view) => view.hidden = !depth);
    if (depth) find(".range").textContent = `${short(depth.near)} m (dark) to ${short(depth.far)} m (bright); black: no reading`;
    const draw = (names, values) => values.map((one, i) => curve(names(i), steps, one));
    const actions = draw((i) => dimensions[i] ?? `action[${i}]`, action);
    const states = state ? draw((i) => `state[${i}]`, state.values) : [];
    curves = [...actions, ...states];
    find(".actions").replaceChildren(...actions);
    find(".states").replaceChildren(...states);
    find(".about-state").textContent = !state ? "No state is stored, or none under a name that this page knows."
      : `${state.name}, in its own units` + (state.size > states.length ? `; the first ${states.length} of ${state.size} numbers` : "");
    show();
  }

  find("select").onchange = choose;
  slider.oninput = () => { stop(); show(); };
  button.onclick = () => {
    if (timer) return stop();
    button.textContent = "Pause";
    timer = setInterval(() => { slider.value = (Number(slider.value) + 1) % episode.images.length; show(); }, 200);
  };
  find(".cloud").onpointermove = ({ buttons, movementX, movementY }) => {
    if (!buttons) return;
    turn = [turn[0] + movementX / 150, turn[1] - movementY / 150];
    turned();
  };
  choose();
}

document.querySelectorAll(".player").forEach(startPlayer);
