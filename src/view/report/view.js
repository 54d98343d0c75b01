// Draws the page of `tessera view`: maps on canvases from packed planes of bytes, one per level of cells.
"use strict";

const levels = report.levels;
const heads = report.heads;
const specs = report.methods.map((method) => method.spec);

// Kept, skipped, pooled, corrected: told apart by lightness and by blue against yellow, which all eyes see; pooled cells
// are dotted and corrected ones hatched as well.
const classes = [
  ["kept", [86, 160, 225]], ["skipped", [232, 232, 232]], ["pooled", [248, 196, 62]], ["corrected", [170, 80, 110]],
];
const colourOf = Object.fromEntries(classes);
const outside = [255, 255, 255];
// Magma, light to dark: lightness alone carries the value.
const scale = [[252, 253, 230], [254, 202, 141], [247, 112, 92], [183, 55, 121], [80, 18, 123], [10, 6, 34]];
const heaviest = 1 + Math.round(-Math.log10(report.smallest_mass) * report.steps_per_decade);
const share = (byte) => (byte - 1) / (heaviest - 1);
const massOf = (byte) => report.smallest_mass * 10 ** ((byte - 1) / report.steps_per_decade);

function between(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((x, c) => x + (at - i) * (stops[i + 1][c] - x));
}
// Thin patterns must not vanish where many pairs share a cell.
const visible = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 0.4);
const palette = Array.from({ length: heaviest + 1 }, (_, byte) => byte === 0 ? outside : between(scale, share(byte)));

// ---- planes

const unpacked = new Map();
/// The bytes of a packed array; unpacked once.
function unpack(text) {
  if (!unpacked.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(text, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
  }
  return unpacked.get(text);
}
const unpackAll = (texts) => Promise.all(texts.map(unpack));

async function unpackMethod(method) {
  const tiles = await unpack(method.tile_mass);
  const planes = { ...method, tiles: new Uint16Array(tiles.buffer, 0, tiles.length / 2) };
  for (const name of ["kept", "pooled", "corrected"]) planes[name] = method[name] ? await unpackAll(method[name]) : null;
  return planes;
}

// ---- what is shown

let current = null;  // {layer, head, attention: [planes], methods: [{kept, pooled, corrected, tiles, ...}]}
let view = { x: 0, y: 0, size: 1 };  // in shares of the keys and of the queries
let pointed = null;  // {row, column} of the finest level
let held = false;
let tokens = null;  // {bytes, ends}
const panes = [
  { id: "attention", method: () => null },
  { id: "left", method: () => current.methods[Number(element("left-choice").value)], strip: "left-mass" },
  { id: "right", method: () => current.methods[Number(element("right-choice").value)], strip: "right-mass" },
].slice(0, specs.length > 1 ? 3 : 2);

/// The finest level whose cells are at least a pixel wide.
function levelFor(pixels) {
  const found = levels.findIndex((level) => pixels / (view.size * Math.max(level.rows, level.columns)) >= 1);
  return found < 0 ? levels.length - 1 : found;
}

/// For each pixel the cell of an axis, -1 beyond its end.
function cellsOfPixels(pixels, begin, tokensOfAxis, cell) {
  const cells = new Int32Array(pixels);
  for (let i = 0; i < pixels; ++i) {
    const at = (begin + (i + 0.5) / pixels * view.size) * tokensOfAxis;
    cells[i] = at < 0 || at >= tokensOfAxis ? -1 : Math.floor(at / cell);
  }
  return cells;
}

/// Every pixel anew: a few hundred thousand, some milliseconds, whatever the number of tokens.
function paint(pane) {
  const pixels = pane.image.width;
  const l = levelFor(pixels);
  const { cell, columns } = levels[l];
  const xs = cellsOfPixels(pixels, view.x, report.keys, cell);
  const ys = cellsOfPixels(pixels, view.y, report.queries, cell);
  const data = pane.image.data;
  const attention = current.attention[l];
  const method = pane.method();
  const kept = method?.kept[l];
  const pooled = method?.pooled?.[l];
  const corrected = method?.corrected?.[l];
  const shaded = element("shade-choice").value === "both";
  const darkness = Float32Array.from(palette, (_, byte) => shaded ? 1 - 0.82 * share(byte) ** 1.9 : 1);
  for (let y = 0, out = 0; y < pixels; ++y) {
    for (let x = 0; x < pixels; ++x, out += 4) {
      const at = xs[x] < 0 || ys[y] < 0 ? -1 : ys[y] * columns + xs[x];
      const byte = at < 0 ? 0 : attention[at];
      data[out + 3] = 255;
      if (!method || byte === 0) {
        const colour = palette[byte];
        for (let i = 0; i < 3; ++i) data[out + i] = colour[i];
        continue;
      }
      const k = visible[kept[at]];
      let p = pooled ? pooled[at] / 255 : 0;
      let c = corrected ? corrected[at] / 255 : 0;
      if (x % 6 < 2 && y % 6 < 2) p *= 0.35;
      if ((x + y) % 8 < 2) c *= 0.35;
      const s = Math.max(0, 1 - p - c);
      for (let i = 0; i < 3; ++i) {
        data[out + i] = darkness[byte] * (k * colourOf.kept[i] +
          (1 - k) * (p * colourOf.pooled[i] + c * colourOf.corrected[i] + s * colourOf.skipped[i]));
      }
    }
  }
  element(pane.id).dataset.level = String(l);
}

/// The recovered mass of the query tiles, beside the rows; where several share a pixel, the least.
function paintStrip(pane) {
  const canvas = element(pane.strip);
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  const tiles = pane.method().tiles;
  context.fillStyle = "#eef0f3";
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#0b5394";
  const tileAt = (y) => Math.floor((view.y + y / height * view.size) * report.queries / report.cell);
  for (let y = 0; y < height; ++y) {
    let least = 65535;
    const first = Math.max(0, tileAt(y));
    const last = Math.max(first, tileAt(y + 0.999));
    if (first >= tiles.length) continue;
    for (let t = first; t <= Math.min(last, tiles.length - 1); ++t) least = Math.min(least, tiles[t]);
    context.fillRect(0, y, least / 65535 * width, 1);
  }
  context.fillStyle = "rgba(255,255,255,.8)";
  for (const mark of [0.25, 0.5, 0.75]) context.fillRect(Math.round(mark * width), 0, 1, height);
}

/// Lines between cells once there is room for them, and the frame of the cell that is pointed at.
function paintLines(pane) {
  const canvas = element(pane.id);
  const context = canvas.getContext("2d");
  context.putImageData(pane.image, 0, 0);
  const pixels = canvas.width;
  const wide = report.cell / report.keys / view.size * pixels;
  const high = report.cell / report.queries / view.size * pixels;
  const x = (column) => (column * report.cell / report.keys - view.x) / view.size * pixels;
  const y = (row) => (row * report.cell / report.queries - view.y) / view.size * pixels;
  if (Math.min(wide, high) >= 12) {
    context.strokeStyle = "rgba(0,0,0,.14)";
    context.beginPath();
    for (let c = Math.floor(view.x * report.keys / report.cell); x(c) <= pixels; ++c) {
      context.moveTo(Math.round(x(c)) + 0.5, 0);
      context.lineTo(Math.round(x(c)) + 0.5, pixels);
    }
    for (let r = Math.floor(view.y * report.queries / report.cell); y(r) <= pixels; ++r) {
      context.moveTo(0, Math.round(y(r)) + 0.5);
      context.lineTo(pixels, Math.round(y(r)) + 0.5);
    }
    context.stroke();
  }
  if (pointed) {
    context.lineWidth = 2;
    context.strokeStyle = held ? "#000" : "#d55e00";
    context.strokeRect(x(pointed.column) - 2, y(pointed.row) - 2, Math.max(wide, 3) + 4, Math.max(high, 3) + 4);
    context.lineWidth = 1;
  }
}

let due = null;
/// Draws at the next frame; all that is asked for until then comes together.
function redraw(what = "all") {
  const whole = what === "all" || due?.whole;
  if (due) {
    due.whole = whole;
    return;
  }
  due = { whole };
  requestAnimationFrame(() => {
    const asked = due;
    due = null;
    if (!current) return;
    for (const pane of panes) {
      if (asked.whole) {
        paint(pane);
        if (pane.strip) paintStrip(pane);
      }
      paintLines(pane);
    }
    document.body.dataset.frames = String(Number(document.body.dataset.frames ?? 0) + 1);
  });
}

function fit() {
  for (const pane of panes) {
    const canvas = element(pane.id);
    const pixels = Math.max(64, Math.round(canvas.clientWidth * devicePixelRatio));
    if (canvas.width !== pixels || !pane.image) {
      canvas.width = canvas.height = pixels;
      pane.image = canvas.getContext("2d").createImageData(pixels, pixels);
    }
    if (!pane.strip) continue;
    const strip = element(pane.strip);
    strip.width = Math.max(16, Math.round(strip.clientWidth * devicePixelRatio));
    strip.height = pixels;
  }
  redraw();
}

// ---- moving about

const smallest = Math.min(1, 8 / Math.max(levels[0].rows, levels[0].columns));
const grouped = (number) => Math.round(number).toLocaleString("en");
const spanText = (first, end) => `${grouped(first)} to ${grouped(Math.max(first, end - 1))}`;

function show(x, y, size) {
  size = Math.min(1, Math.max(smallest, size));
  view = { x: Math.min(1 - size, Math.max(0, x)), y: Math.min(1 - size, Math.max(0, y)), size };
  element("range").textContent = `queries ${spanText(Math.floor(view.y * report.queries), Math.ceil((view.y + size) * report.queries))}, ` +
    `keys ${spanText(Math.floor(view.x * report.keys), Math.ceil((view.x + size) * report.keys))}`;
  redraw();
}
/// Keeps the place at shares (u, v) of the canvas where it is.
function zoom(factor, u = 0.5, v = 0.5) {
  const size = Math.min(1, Math.max(smallest, view.size / factor));
  show(view.x + u * (view.size - size), view.y + v * (view.size - size), size);
}

function placeOf(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}
function cellAt(u, v) {
  const column = Math.floor((view.x + u * view.size) * report.keys / report.cell);
  const row = Math.floor((view.y + v * view.size) * report.queries / report.cell);
  return row < 0 || column < 0 || row >= levels[0].rows || column >= levels[0].columns ? null : { row, column };
}

for (const pane of panes) {
  const canvas = element(pane.id);
  let drag = null;
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(2 ** (-event.deltaY / 240), ...placeOf(event, canvas));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = { at: placeOf(event, canvas), from: { ...view }, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    const [u, v] = placeOf(event, canvas);
    if (drag) {
      drag.moved ||= Math.hypot(u - drag.at[0], v - drag.at[1]) > 0.01;
      if (drag.moved)
        show(drag.from.x - (u - drag.at[0]) * drag.from.size, drag.from.y - (v - drag.at[1]) * drag.from.size, drag.from.size);
    } else if (!held) {
      point(cellAt(u, v));
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const clicked = drag && !drag.moved;
    drag = null;
    if (!clicked) return;
    const cell = cellAt(...placeOf(event, canvas));
    held = !(held && cell && pointed && cell.row === pointed.row && cell.column === pointed.column);
    point(cell);
  });
  canvas.addEventListener("dblclick", (event) => zoom(4, ...placeOf(event, canvas)));
  canvas.addEventListener("pointerleave", () => {
    if (!held) point(null);
  });
  canvas.addEventListener("keydown", (event) => {
    const step = view.size / 8;
    const moves = {
      ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
    };
    if (moves[event.key]) show(view.x + moves[event.key][0], view.y + moves[event.key][1], view.size);
    else if (event.key === "+" || event.key === "=") zoom(2);
    else if (event.key === "-") zoom(0.5);
    else if (event.key === "0") show(0, 0, 1);
    else if (event.key === "Escape") { held = false; point(null); } else return;
    event.preventDefault();
  });
}
element("zoom-in").addEventListener("click", () => zoom(2));
element("zoom-out").addEventListener("click", () => zoom(0.5));
element("zoom-whole").addEventListener("click", () => show(0, 0, 1));

// ---- what a cell says

/// Tokens [first, end) as text; of a long stretch its two ends.
function textOf(first, end) {
  if (!tokens) return "";
  const decoder = new TextDecoder();
  const text = (a, b) => decoder.decode(tokens.bytes.subarray(a === 0 ? 0 : tokens.ends[a - 1], tokens.ends[b - 1]));
  const whole = end - first <= 96 ? text(first, end) : `${text(first, first + 48)} … ${text(end - 48, end)}`;
  return ` “${whole.replaceAll("\n", "⏎").replaceAll("\t", "⇥")}”`;
}
const percent = (byte) => byte === 255 ? "100 %" : byte === 0 ? "0 %" : `${(byte / 2.55).toPrecision(2)} %`;

function point(cell) {
  pointed = cell;
  if (!current) return;
  describe();
  redraw("lines");
}

function describe() {
  for (const pane of panes.slice(1)) element(`at-${pane.id}`).textContent = "";
  element("at-keys").textContent = element("at-attention").textContent = "";
  if (!pointed) {
    element("at-queries").textContent = "Point at a cell; a click holds it.";
    return;
  }
  const { row, column } = pointed;
  const { cell, columns } = levels[0];
  const queryEnd = Math.min(report.queries, (row + 1) * cell);
  const keyEnd = Math.min(report.keys, (column + 1) * cell);
  const offset = report.offset;
  element("at-queries").textContent = spanText(offset + row * cell, offset + queryEnd) +
    (offset >= 0 && offset + report.queries <= report.keys ? textOf(offset + row * cell, offset + queryEnd) : "");
  element("at-keys").textContent = spanText(column * cell, keyEnd) + textOf(column * cell, keyEnd);
  const at = row * columns + column;
  const byte = current.attention[0][at];
  element("at-attention").textContent = byte === 0 ? "behind the queries: not allowed"
    : byte === 1 ? `at most ${report.smallest_mass} of the mass of its queries`
    : `${massOf(byte).toPrecision(2)} of the mass of its queries`;
  for (const pane of panes.slice(1)) {
    const method = pane.method();
    const parts = [["kept", method.kept], ["pooled", method.pooled], ["corrected", method.corrected]]
      .filter(([, planes]) => planes).map(([name, planes]) => [name, planes[0][at]]).filter(([, x]) => x > 0);
    const said = byte === 0 ? "" : parts.length === 0 ? "skipped; "
      : parts.map(([name, x]) => `${name} ${percent(x)}`).join(", ") + "; ";
    element(`at-${pane.id}`).textContent =
      `${said}the query tile recovers ${(method.tiles[row] / 65535).toFixed(4)} of its mass`;
  }
}

// ---- choosing

function captions() {
  element("attention-title").textContent = `${report.calls} ${current.layer}, head ${current.head}`;
  for (const pane of panes.slice(1)) {
    const spec = specs[Number(element(`${pane.id}-choice`).value)];
    const method = pane.method();
    element(`${pane.id}-title`).textContent = element(`${pane.id}-name`).textContent = spec;
    element(`${pane.id}-numbers`).textContent = `density ${(100 * method.density).toFixed(1)} %, ` +
      `mass ${method.mass.toFixed(3)}, least tile ${method.least_mass.toFixed(3)}, error ${short(method.rel_l2)}`;
  }
}

let asked = 0;
async function choose(i) {
  const turn = ++asked;
  const head = heads[i];
  const [attention, methods] = await Promise.all([unpackAll(head.attention), Promise.all(head.methods.map(unpackMethod))]);
  if (turn !== asked) return;  // another head was chosen meanwhile
  current = { ...head, attention, methods };
  for (const button of element("heads").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === i));
  captions();
  describe();
  redraw();
}

async function thumbnail(canvas, head) {
  const level = levels[levels.length - 1];
  const plane = await unpack(head.attention[levels.length - 1]);
  canvas.width = level.columns;
  canvas.height = level.rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(level.columns, level.rows);
  plane.forEach((byte, i) => {
    palette[byte].forEach((x, c) => { image.data[4 * i + c] = x; });
    image.data[4 * i + 3] = 255;
  });
  context.putImageData(image, 0, 0);
}

function makeThumbnails() {
  for (const layer of unique(heads.map((head) => head.layer))) {
    const line = document.createElement("div");
    line.append(Object.assign(document.createElement("span"), { textContent: `${report.calls} ${layer}` }));
    heads.forEach((head, i) => {
      if (head.layer !== layer) return;
      const button = document.createElement("button");
      button.dataset.index = String(i);
      button.title = `${report.calls} ${layer}, head ${head.head}`;
      const canvas = document.createElement("canvas");
      button.append(canvas, `head ${head.head}`);
      button.addEventListener("click", () => choose(i));
      line.append(button);
      thumbnail(canvas, head);
    });
    element("heads").append(line);
  }
}

function makeLegend() {
  const context = element("scale").getContext("2d");
  for (let x = 0; x < 180; ++x) {
    context.fillStyle = `rgb(${between(scale, x / 179).map(Math.round).join()})`;
    context.fillRect(x, 0, 1, 14);
  }
  element("scale-ends").textContent = `10^${Math.log10(report.smallest_mass)} to 1, logarithmic`;
  const used = (name) => name === "kept" || name === "skipped" || heads.some((head) => head.methods.some((m) => m[name]));
  for (const [name, colour] of classes) {
    if (!used(name)) continue;
    const label = document.createElement("span");
    const box = document.createElement("i");
    box.className = name;
    box.style.backgroundColor = `rgb(${colour.join()})`;
    label.append(box, name);
    element("classes").append(label);
  }
}

async function start() {
  element("summary").textContent = `${report.source}: ${grouped(report.queries)} queries, ${grouped(report.keys)} keys, ` +
    `${report.causal ? "causal" : "bidirectional"}; ${heads.length} heads, cells of ${report.cell} tokens`;
  specs.forEach((spec, i) => {
    for (const id of ["left-choice", "right-choice"]) element(id).append(new Option(spec, String(i)));
  });
  for (const id of ["left-choice", "right-choice", "shade-choice"]) {
    element(id).addEventListener("change", () => {
      captions();
      describe();
      redraw();
    });
  }
  if (specs.length > 1) element("right-choice").value = "1";
  for (const id of ["right-figure", "right-label", "right-name", "at-right"]) element(id).hidden = specs.length < 2;
  makeLegend();
  makeThumbnails();
  makeTable("rows", [
    [report.calls, (row) => row.head.layer], ["head", (row) => row.head.head], ["method", (row) => specs[row.m]],
    ["density", (row) => row.method.density], ["mass", (row) => row.method.mass],
    ["least tile", (row) => row.method.least_mass], ["rel. L2", (row) => row.method.rel_l2],
  ], heads.flatMap((head, i) => head.methods.map((method, m) => ({ head, i, method, m }))), (row) => choose(row.i));
  if (report.text) {
    const [bytes, packedLengths] = await unpackAll([report.text.bytes, report.text.lengths]);
    const lengths = new Uint16Array(packedLengths.buffer, 0, packedLengths.length / 2);
    let end = 0;
    tokens = { bytes, ends: Uint32Array.from(lengths, (length) => end += length) };
  }
  await choose(0);
  fit();
  show(0, 0, 1);
  addEventListener("resize", fit);
  requestAnimationFrame(() => requestAnimationFrame(() => { document.body.dataset.ready = "true"; }));
}
start();
