// The cloud on a plain canvas: a small ball for each point, the nearer in front, darker where something stands before it, as
// `pointalign render` draws it. No WebGL, so that it looks the same on every device, with and without a graphics card.
const canvas = element.querySelector("canvas");
const context = canvas.getContext("2d");
const sizeSlider = element.querySelector("input");
const START = { yaw: 0.6, pitch: 0.38, zoom: 1 };
const PIXELS = { still: 9e5, moving: 3e5 };
const DISTANCE = 4; // of the eye, in radii of the cloud
const view = { ...START };
let cloud = null;
let settled = null;
let wanted = false;

function decoded(text, kind) {
  return new kind(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
}

function take() {
  const given = JSON.parse(props.value || "null");
  if (!given) return;
  const xyz = decoded(given.xyz, Int16Array);
  cloud = { name: given.name, count: xyz.length / 3, spacing: given.spacing, rgb: decoded(given.rgb, Uint8Array) };
  cloud.xyz = Float32Array.from(xyz, (value) => value / 32767);
  canvas.setAttribute("aria-label", `${cloud.name}: ${cloud.count} points; arrow keys turn it, plus and minus zoom`);
  Object.assign(view, START);
  draw();
}

function resized(limit) {
  const { clientWidth, clientHeight } = canvas;
  const ratio = Math.min(window.devicePixelRatio || 1, Math.sqrt(limit / Math.max(clientWidth * clientHeight, 1)));
  const [width, height] = [clientWidth, clientHeight].map((side) => Math.max(Math.round(side * ratio), 1));
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
}

const balls = new Map();
function ball(radius) {
  const key = Math.round(radius * 4);
  if (!balls.has(key)) {
    const pixels = [];
    const reach = Math.ceil(radius);
    for (let down = -reach; down <= reach; down++)
      for (let right = -reach; right <= reach; right++) {
        const rise = radius * radius - right * right - down * down;
        if (rise > 0 || (right === 0 && down === 0)) pixels.push(right, down, Math.sqrt(Math.max(rise, 0)) / radius);
      }
    balls.set(key, pixels);
  }
  return balls.get(key);
}

// Where each point falls; then its ball, pixel by pixel, wherever nothing nearer is.
function splat(width, height, owner, depth, light) {
  const [siny, cosy, sinp, cosp] = [Math.sin(view.yaw), Math.cos(view.yaw), Math.sin(view.pitch), Math.cos(view.pitch)];
  const scale = 0.46 * Math.min(width, height) * view.zoom * DISTANCE;
  const size = cloud.spacing * Number(sizeSlider.value);
  for (let point = 0; point < cloud.count; point++) {
    const [x, y, z] = [cloud.xyz[3 * point], cloud.xyz[3 * point + 1], cloud.xyz[3 * point + 2]];
    const near = siny * x + cosy * z;
    const toward = cosp * near + sinp * y;
    const perPixel = scale / (DISTANCE - toward);
    const column = Math.round(width / 2 + perPixel * (cosy * x - siny * z));
    const row = Math.round(height / 2 - perPixel * (cosp * y - sinp * near));
    const radius = Math.min(Math.max(size * perPixel, 0.75), 40);
    const pixels = ball(radius);
    for (let i = 0; i < pixels.length; i += 3) {
      const right = column + pixels[i];
      const down = row + pixels[i + 1];
      if (right < 0 || right >= width || down < 0 || down >= height) continue;
      const place = down * width + right;
      const here = toward + (pixels[i + 2] * radius) / perPixel;
      if (here <= depth[place]) continue;
      depth[place] = here;
      owner[place] = point;
      light[place] = 0.7 + 0.3 * pixels[i + 2];
    }
  }
  return size;
}

// Eye-dome lighting. Source: Boucheny 2009 (PhD thesis, Universite Joseph Fourier, Grenoble).
function shaded(place, width, depth, step) {
  let light = 0;
  for (const reach of [2, 5])
    for (const move of [reach, -reach, reach * width, -reach * width]) {
      const beside = depth[place + move];
      if (beside > depth[place]) light += Math.min((beside - depth[place]) / step, 4) / 8;
    }
  return 0.25 + 0.75 * Math.exp(-0.35 * light);
}

function draw(moving = false) {
  if (!cloud || !canvas.clientWidth) return;
  resized(moving ? PIXELS.moving : PIXELS.still);
  const { width, height } = canvas;
  const owner = new Int32Array(width * height).fill(-1);
  const depth = new Float32Array(width * height).fill(-1e9);
  const light = new Float32Array(width * height);
  const step = Math.max(splat(width, height, owner, depth, light), 1e-6);
  const image = context.createImageData(width, height);
  for (let place = 0; place < owner.length; place++) {
    const point = owner[place];
    if (point < 0) continue;
    const bright = light[place] * shaded(place, width, depth, step);
    for (let part = 0; part < 3; part++) image.data[4 * place + part] = cloud.rgb[3 * point + part] * bright;
    image.data[4 * place + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  Object.assign(canvas.dataset, { name: cloud.name, points: cloud.count, zoom: view.zoom.toFixed(3) });
}

// Coarser while it moves, sharp when it rests.
function moved() {
  if (!wanted) {
    wanted = true;
    requestAnimationFrame(() => {
      wanted = false;
      draw(true);
    });
  }
  clearTimeout(settled);
  settled = setTimeout(() => draw(), 150);
}

function turn(right, up) {
  view.yaw -= right;
  view.pitch = Math.min(Math.max(view.pitch + up, -1.57), 1.57);
  moved();
}

function zoom(factor) {
  view.zoom = Math.min(Math.max(view.zoom * factor, 0.3), 12);
  moved();
}

const fingers = new Map();
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
});
canvas.addEventListener("pointermove", (event) => {
  const before = fingers.get(event.pointerId);
  if (!before) return;
  const here = [event.clientX, event.clientY];
  if (fingers.size === 1) turn((here[0] - before[0]) * 0.009, (here[1] - before[1]) * 0.009);
  if (fingers.size === 2) {
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const apart = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]);
    zoom(apart(here) / Math.max(apart(before), 1));
  }
  fingers.set(event.pointerId, here);
});
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * 0.0015));
}, { passive: false });

const KEYS = {
  ArrowLeft: () => turn(-0.15, 0),
  ArrowRight: () => turn(0.15, 0),
  ArrowUp: () => turn(0, 0.15),
  ArrowDown: () => turn(0, -0.15),
  "+": () => zoom(1.2),
  "=": () => zoom(1.2),
  "-": () => zoom(1 / 1.2),
  0: reset,
};
canvas.addEventListener("keydown", (event) => {
  if (!KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

function reset() {
  Object.assign(view, START);
  moved();
}

const BUTTONS = { nearer: () => zoom(1.25), farther: () => zoom(1 / 1.25), reset };
for (const [name, act] of Object.entries(BUTTONS)) element.querySelector(`[data-act=${name}]`).addEventListener("click", act);
sizeSlider.addEventListener("input", moved);
canvas.addEventListener("dblclick", reset);
new ResizeObserver(() => draw()).observe(canvas);
watch("value", take);
take();
