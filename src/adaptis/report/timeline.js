// Decodes the timelines of the report and paints them. control.js follows in the same function. All
// charts share one view, the visible seconds. Nothing is read but what is in the page.
const began = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const OPS = data.ops.length, GUTTER = 76, RIGHT = 14, AXIS = 24, BOTTOM = 6;
const tip = document.getElementById("tip");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const timelines = data.timelines.map(decode);
const limit = Math.max(...timelines.map((t) => Math.max(t.step, t.makespan)), 0) || 1;
const view = { from: 0, to: limit };
let theme, pointer = null, waiting = false, drawn = 0;

// --- data ----------------------------------------------------------------------------------------

function decode(packed) {
  const devices = packed.devices.map((d) => decodeDevice(d, packed.tick));
  const memory = packed.memory.map((curve) => decodeCurve(curve, packed.tick));
  const count = devices.reduce((n, d) => n + d.count, 0);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), 1);
  const peak = most(memory.map((curve) => most(curve.bytes)));
  return { ...packed, devices, memory, count, peak, index: null };
}

// The inverse of pack.py: every column holds differences from what was to be expected.
function decodeDevice(packed, tick) {
  const count = packed.kind.length;
  const device = {
    count, code: new Int32Array(count), microbatch: new Int32Array(count),
    start: new Float64Array(count), end: new Float64Array(count),
    held: new Map(packed.held.map(([row, ticks]) => [row, ticks * tick])),
  };
  const last = packed.kinds.map(() => -1), length = packed.kinds.map(() => 0);
  let clock = 0;
  for (let i = 0; i < count; i++) {
    const kind = packed.kind[i];
    last[kind] += packed.microbatch[i] + 1;
    length[kind] += packed.length[i];
    device.code[i] = packed.kinds[kind];
    device.microbatch[i] = last[kind];
    device.start[i] = (clock += packed.gap[i]) * tick;
    device.end[i] = (clock += length[kind]) * tick;
  }
  return device;
}

function decodeCurve(packed, tick) {
  let time = 0, bytes = 0;
  return {
    time: Float64Array.from(packed.time, (d) => (time += d) * tick),
    bytes: Float64Array.from(packed.bytes, (d) => (bytes += d)),
  };
}

// The first index with values[index] > x; values ascend.
function after(values, x) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > x) high = middle; else low = middle + 1;
  }
  return low;
}

const stageOf = (code) => Math.floor(code / OPS);
const nameOf = (d, i) => `${stageOf(d.code[i])}${data.ops[d.code[i] % OPS]}${d.microbatch[i]}`;
const isHead = (code) => data.head.includes(code % OPS); // of a sharded head: not of a stage
function labelOf(t, d, i) {
  const many = t.many && !isHead(d.code[i]);
  return many ? nameOf(d, i) : data.ops[d.code[i] % OPS] + d.microbatch[i];
}

// Both are below 2^31, their pair is exact as a float for less than 2^22 codes.
const key = (code, microbatch) => code * 2 ** 31 + microbatch;

// Where an instruction is; of a pass of a sharded head, which all devices have, the last to end.
function find(t, code, microbatch) {
  if (!t.index) {
    t.index = new Map();
    t.devices.forEach((d, device) => {
      for (let i = 0; i < d.count; i++) {
        const name = key(d.code[i], d.microbatch[i]), known = t.index.get(name);
        if (!known || t.devices[known[0]].end[known[1]] < d.end[i]) t.index.set(name, [device, i]);
      }
    });
  }
  return t.index.get(key(code, microbatch));
}

// The same instruction in the other timeline of a pair: the timeline and the number in the device.
function twin(t, device, i) {
  const other = t.pair && timelines.find((o) => o !== t && o.pair === t.pair);
  const d = t.devices[device], theirs = other && other.devices[device];
  if (!theirs) return null;
  const same = (code, j) => code === d.code[i] && theirs.microbatch[j] === d.microbatch[i];
  const row = theirs.code.findIndex(same);
  return row < 0 ? null : { timeline: other, row };
}

// What instruction i of a device waited for: the latest of those that wrote what it reads.
function dependency(t, device, i) {
  const d = t.devices[device], op = d.code[i] % OPS, stage = stageOf(d.code[i]);
  let best = null;
  for (const [writer, offset] of t.reads[op]) {
    const source = stage + offset;
    const at = source < 0 ? null : find(t, source * OPS + writer, d.microbatch[i]);
    if (at && (!best || t.devices[at[0]].end[at[1]] > t.devices[best[0]].end[best[1]])) best = at;
  }
  return best;
}

// --- words ---------------------------------------------------------------------------------------

const UNITS = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
// What would be rounded up to the next unit is shown in it.
function unitOf(seconds) {
  return UNITS.find(([unit]) => Math.abs(seconds) >= 0.99995 * unit) || UNITS[seconds ? 3 : 0];
}

function duration(seconds) {
  const size = Math.abs(seconds);
  if (size === 0) return "0";
  const [unit, name] = unitOf(size), value = size / unit;
  return `${(seconds / unit).toFixed(value < 10 ? 3 : value < 100 ? 2 : 1)} ${name}`;
}

// A point in time, with the digits that a length of `resolution` needs.
function moment(seconds, resolution) {
  const [unit, name] = unitOf(seconds);
  const digits = resolution > 0 ? Math.ceil(2 - Math.log10(resolution / unit)) : 3;
  return `${(seconds / unit).toFixed(Math.min(Math.max(digits, 0), 9))} ${name}`;
}

function bytes(count) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= unit) return `${(count / unit).toFixed(1)} ${name}`;
  }
  return `${count} B`;
}

// How long an instruction waited, for what, and which cause that counts as.
function waits(t, device, i) {
  const d = t.devices[device], clock = i ? d.end[i - 1] : 0, gap = d.start[i] - clock;
  const since = i ? `after ${nameOf(d, i - 1)}` : "at the start of the step";
  if (gap <= t.tick * 2) return [`Began at once ${since}`];
  const lines = [`Idle for ${duration(gap)} ${since}${i ? "" : " (warm-up)"}`];
  const at = dependency(t, device, i);
  const ready = at ? t.devices[at[0]].end[at[1]] : 0;
  const computing = Math.min(Math.max(ready - clock, 0), gap), rest = gap - computing;
  let held = d.held.get(i) || 0;
  const cause = (seconds, name) => { // all that is before the first instruction is warm-up
    if (!i) return duration(seconds);
    const memory = name === "imbalance" ? Math.min(seconds, held) : 0;
    held -= memory;
    if (seconds - memory <= t.tick * 2) return `${duration(seconds)} (${memory ? "memory" : name})`;
    const parts = memory ? `${duration(memory)} memory, ${duration(seconds - memory)} ${name}` : name;
    return `${duration(seconds)} (${parts})`;
  };
  if (computing > 0) {
    const source = nameOf(t.devices[at[0]], at[1]);
    lines.push(`${cause(computing, "imbalance")} until ${source} on device ${at[0]} was done`);
  }
  if (rest > t.tick * 2) {
    const moved = at && at[0] !== device;
    lines.push(moved ? `${cause(rest, "transfer")} until its result came over from device ${at[0]}`
      : `${cause(rest, "imbalance")} more, though all it reads was there`);
  }
  return lines;
}

// What the other timeline of a pair says of an instruction.
function difference(t, device, i) {
  const found = twin(t, device, i);
  if (!found) return [];
  const d = t.devices[device], other = found.timeline.devices[device], j = found.row;
  const mine = d.end[i] - d.start[i], theirs = other.end[j] - other.start[j];
  const percent = ((theirs / mine - 1) * 100).toFixed(1).replace("-", "−");
  const change = mine > 0 ? ` (${theirs < mine ? "" : "+"}${percent} %)` : "";
  const later = other.start[j] - d.start[i], resolution = 2 * Math.max(t.tick, found.timeline.tick);
  const order = later < 0 ? "earlier" : "later";
  const began = Math.abs(later) <= resolution ? "began at the same time"
    : `began ${duration(Math.abs(later))} ${order}`;
  return [`${found.timeline.source}: ${duration(theirs)} long${change}, ${began}`];
}

// The text for a moment of a device: a heading, lines, and the instruction it is about, if any.
function describe(t, device, seconds) {
  const d = t.devices[device], i = after(d.start, seconds) - 1;
  const memory = memoryAt(t, device, seconds);
  const tail = memory === null ? [] : [`${bytes(memory)} in use`];
  if (i >= 0 && seconds < d.end[i]) {
    const code = d.code[i], stage = stageOf(code), lines = [];
    if (t.layers[stage]) lines.push(t.layers[stage]);
    const length = d.end[i] - d.start[i];
    const [from, to] = [moment(d.start[i], length), moment(d.end[i], length)];
    lines.push(`${from} to ${to}, ${duration(length)} long`);
    const what = `${nameOf(d, i)}: ${data.names[code % OPS]}`;
    const of = isHead(code) ? "" : `, stage ${stage}`;
    const head = `${what}${of}, micro-batch ${d.microbatch[i]}, device ${device}`;
    lines.push(...difference(t, device, i));
    return { head, lines, waits: [...waits(t, device, i), ...tail], row: i };
  }
  if (i + 1 < d.count) {
    const lines = waits(t, device, i + 1);
    const head = `Idle before ${nameOf(d, i + 1)}, device ${device}`;
    return { head, lines, waits: tail, row: i + 1 };
  }
  const last = d.count ? d.end[d.count - 1] : 0;
  if (seconds > t.step) return null;
  if (seconds > t.makespan) {
    const lines = [duration(t.step - t.makespan)];
    return { head: `Optimizer, device ${device}`, lines, waits: tail };
  }
  const rest = [`Idle for ${duration(t.makespan - last)} until the last instruction ends`];
  return { head: `Cool-down, device ${device}`, lines: rest, waits: tail };
}

function memoryAt(t, device, seconds) {
  const curve = t.memory[device];
  if (!curve || !curve.time.length) return null;
  return curve.bytes[Math.max(after(curve.time, seconds) - 1, 0)];
}

// --- painting ------------------------------------------------------------------------------------

// A colour as one pixel of an ImageData seen as 32-bit integers, little-endian as all browsers are.
function pixel(colour) {
  const hex = colour.length === 4 ? colour.replace(/[0-9a-f]/gi, "$&$&") : colour;
  const value = parseInt(hex.slice(1), 16);
  return (0xff000000 | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  theme = { font: getComputedStyle(document.body).fontFamily };
  for (const name of ["text", "quiet", "row", "split", "after", "accent", "memory"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

function layout(chart) {
  const t = chart.timeline, count = t.devices.length;
  const heights = [[4, 34], [8, 28], [16, 22], [32, 15], [256, 11], [Infinity, 3]];
  chart.row = heights.find(([most]) => count <= most)[1];
  chart.curve = t.memory.length ? (count <= 16 ? 16 : 7) : 0;
  chart.pitch = chart.row + chart.curve + (count <= 16 ? 5 : 2);
  chart.width = chart.box.clientWidth;
  chart.height = AXIS + count * chart.pitch + BOTTOM;
  chart.ratio = window.devicePixelRatio || 1;
  for (const canvas of [chart.back, chart.front]) {
    canvas.width = Math.round(chart.width * chart.ratio);
    canvas.height = Math.round(chart.height * chart.ratio);
    canvas.style.height = `${chart.height}px`;
  }
  chart.plot = Math.max(chart.width - GUTTER - RIGHT, 50);
  chart.bin = Math.max(1, Math.round(2 * chart.ratio)); // pixels of a column of shares
  chart.columns = Math.round(chart.plot * chart.ratio) / chart.bin;
  chart.image = null;
}

const perSecond = (pixels) => pixels / (view.to - view.from);
const toX = (chart, seconds) => GUTTER + (seconds - view.from) * perSecond(chart.plot);
const toSeconds = (chart, x) => view.from + (x - GUTTER) / perSecond(chart.plot);

function paint(chart) {
  const context = chart.back.getContext("2d", { alpha: true }), { ratio, timeline: t } = chart;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, chart.width, chart.height);
  let visible = 0;
  for (const d of t.devices) visible += after(d.start, view.to) - after(d.end, view.from);
  chart.dense = visible > (t.devices.length * chart.plot) / 3;
  const labels = paintPixels(chart, context);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  paintAfter(chart, context);
  paintAxis(chart, context);
  paintLabels(chart, context, labels);
  paintNames(chart, context);
}

// All rows go through one image: what that costs depends on the pixels, hardly on the instructions.
function paintPixels(chart, context) {
  const { ratio, timeline: t } = chart;
  const width = Math.round(chart.plot * ratio), height = Math.round(chart.row * ratio);
  const line = (device) => Math.round(device * chart.pitch * ratio);
  const total = line(t.devices.length - 1) + height + Math.round(chart.curve * ratio);
  if (!t.devices.length) return [];
  const known = chart.image;
  if (!known) chart.image = context.createImageData(width, total);
  const pixels = new Uint32Array(chart.image.data.buffer);
  const [left, right] = known ? exposed(chart, pixels, width) : fresh(chart, width);
  chart.painted = right - left;
  for (let at = left; at < pixels.length; at += width) pixels.fill(0, at, at + right - left);
  const labels = [];
  t.devices.forEach((d, device) => {
    const top = line(device) * width;
    if (chart.dense) paintShares(chart, d, pixels, top, width, height, left, right);
    else paintBoxes(chart, d, device, pixels, top, width, height, labels);
    const curve = t.memory[device];
    if (curve) paintMemory(chart, curve, pixels, top + height * width, width, left, right);
  });
  context.putImageData(chart.image, Math.round(GUTTER * ratio), Math.round(AXIS * ratio));
  return labels;
}

// All columns are to be painted, from the moment at which the view begins.
function fresh(chart, width) {
  Object.assign(chart, { from: view.from, length: view.to - view.from, shares: chart.dense });
  return [0, width];
}

// Moves what is painted along with the view; returns which columns are left to paint.
function exposed(chart, pixels, width) {
  const scale = perSecond(width / chart.bin), moved = (view.from - chart.from) * scale;
  const bins = Math.round(moved), by = bins * chart.bin;
  const same = chart.dense && chart.shares && Math.abs(chart.length * scale * chart.bin - width) < 1e-3;
  if (!same || Math.abs(moved - bins) > 1e-3 || Math.abs(by) >= width) return fresh(chart, width);
  chart.from += bins / scale;
  if (by <= 0) {
    pixels.copyWithin(-by, 0);
    return [0, -by];
  }
  pixels.copyWithin(0, by);
  return [Math.floor((width - by) / chart.bin) * chart.bin, width];
}

function paintBoxes(chart, d, device, pixels, top, width, height, labels) {
  const { timeline: t, ratio } = chart, scale = perSecond(width), split = pixel(theme.split);
  const line = pixels.subarray(top, top + width);
  const end = Math.min(Math.round((t.makespan - view.from) * scale), width);
  if (end > 0) line.fill(pixel(theme.row), Math.max(0, Math.round(-view.from * scale)), end);
  for (let i = after(d.end, view.from); i < d.count && d.start[i] < view.to; i++) {
    const code = d.code[i], shade = t.shade[stageOf(code)];
    const x0 = Math.round((d.start[i] - view.from) * scale);
    const x1 = Math.round((d.end[i] - view.from) * scale);
    const right = Math.max(x1, x0 + 1), left = Math.max(x0, 0);
    line.fill(chart.fills[shade][code % OPS], left, Math.min(right, width));
    // A line parts neighbours that would run together; boxes of few pixels cannot spare it.
    if (x1 - x0 >= 5 && x1 <= width) line[x1 - 1] = split;
    const room = (Math.min(right, width) - left) / ratio;
    if (room >= 16) labels.push([device, i, left / ratio, room]);
  }
  for (let y = 1; y < height; y++) pixels.copyWithin(top + y * width, top, top + width);
}

// Where instructions are too small to show, columns stack the shares of the operations.
function paintShares(chart, d, pixels, top, width, height, left, right) {
  const t = chart.timeline, { bin } = chart, scale = perSecond(width / bin);
  const bins = Math.ceil((right - left) / bin), origin = chart.from + left / bin / scale;
  const share = new Float32Array(bins * OPS);
  const { code, start, end: stop } = d, until = origin + bins / scale;
  for (let i = after(stop, origin); i < d.count && start[i] < until; i++) {
    const op = code[i] % OPS;
    const from = Math.max((start[i] - origin) * scale, 0);
    const to = Math.min((stop[i] - origin) * scale, bins), first = Math.floor(from);
    if (to <= first + 1) { share[first * OPS + op] += to - from; continue; } // most are this small
    for (let b = first; b < to; b++) {
      share[b * OPS + op] += Math.min(to, b + 1) - Math.max(from, b);
    }
  }
  const row = pixel(theme.row), end = (t.makespan - origin) * scale;
  for (let b = 0; b < bins && b < end; b++) {
    const x = left + b * bin, edge = Math.min(x + bin, right);
    let y = height, filled = 0;
    for (let op = 0; op < OPS; op++) {
      if (!share[b * OPS + op]) continue;
      filled += share[b * OPS + op];
      const upper = Math.max(0, height - Math.round(filled * height));
      y = stack(pixels, chart.base[op], top, width, x, edge, y, upper);
    }
    stack(pixels, row, top, width, x, edge, y, 0);
  }
}

// Colours the lines from y up to `upper` between x and `right`; returns where it ended.
function stack(pixels, colour, top, width, x, right, y, upper) {
  for (; y > upper; y--) {
    const line = top + (y - 1) * width;
    for (let at = line + x; at < line + right; at++) pixels[at] = colour;
  }
  return y;
}

function paintAfter(chart, context) {
  const t = chart.timeline, from = Math.max(toX(chart, t.makespan), GUTTER);
  const to = Math.min(toX(chart, t.step), GUTTER + chart.plot);
  if (to - from < 0.5) return;
  t.devices.forEach((_, device) => {
    const y = AXIS + device * chart.pitch;
    context.save();
    context.beginPath();
    context.rect(from, y, to - from, chart.row);
    context.clip();
    context.fillStyle = theme.row;
    context.fill();
    context.strokeStyle = theme.after;
    context.lineWidth = 2;
    context.beginPath();
    for (let x = from - chart.row; x < to; x += 7) {
      context.moveTo(x, y + chart.row);
      context.lineTo(x + chart.row, y);
    }
    context.stroke();
    context.restore();
  });
}

function paintLabels(chart, context, labels) {
  const t = chart.timeline;
  context.font = `${chart.row >= 22 ? 11.5 : 9}px ${theme.font}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (const [device, i, left, room] of labels) {
    const d = t.devices[device], text = labelOf(t, d, i), code = d.code[i];
    if (text.length * 7 > room && context.measureText(text).width > room - 3) continue;
    context.fillStyle = t.inks[t.shade[stageOf(code)]][code % OPS];
    const y = AXIS + device * chart.pitch + chart.row / 2 + 0.5;
    context.fillText(text, GUTTER + left + room / 2, y);
  }
}

// A bar a column, as high as the most memory that was in use in its time.
function paintMemory(chart, curve, pixels, top, width, left, right) {
  const { ratio, timeline: t, from } = chart, scale = perSecond(width);
  const height = Math.round(chart.curve * ratio), room = height - Math.round(2 * ratio);
  const stop = Math.min(Math.round((t.makespan - from) * scale), right);
  const first = Math.max(left, Math.round(-from * scale));
  const colour = ((pixel(theme.memory) & 0xffffff) | 0x73000000) >>> 0;
  let i = Math.max(after(curve.time, from + first / scale) - 1, 0);
  if (!curve.time.length) return;
  for (let x = first; x < stop; x++) {
    const until = from + (x + 1) / scale;
    let most = curve.bytes[i];
    while (i + 1 < curve.time.length && curve.time[i + 1] < until) {
      most = Math.max(most, curve.bytes[++i]);
    }
    const bar = Math.round((most / t.peak) * room);
    for (let y = height - bar; y < height; y++) pixels[top + y * width + x] = colour;
  }
}

function paintNames(chart, context) {
  const count = chart.timeline.devices.length, every = Math.ceil(14 / chart.pitch);
  context.font = `12px ${theme.font}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillStyle = theme.quiet;
  for (let device = 0; device < count; device += every) {
    context.fillText(`device ${device}`, GUTTER - 10, AXIS + device * chart.pitch + chart.row / 2);
  }
}

function paintAxis(chart, context) {
  const length = view.to - view.from, size = Math.max(Math.abs(view.to), length);
  const [unit, name] = unitOf(size);
  const most = Math.max(2, Math.floor(chart.plot / 90));
  const power = 10 ** Math.floor(Math.log10(length / unit / most));
  const step = power * ([1, 2, 5].find((f) => length / unit / (f * power) <= most) || 10);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  context.font = `11.5px ${theme.font}`;
  context.textBaseline = "middle";
  context.fillStyle = theme.quiet;
  const last = Math.floor(view.to / unit / step + 1e-9);
  for (let n = Math.ceil(view.from / unit / step - 1e-9); n <= last; n++) {
    const x = toX(chart, n * step * unit);
    context.globalAlpha = 0.2;
    context.fillRect(Math.round(x), AXIS - 6, 1, chart.height - AXIS - BOTTOM + 6);
    context.globalAlpha = 1;
    const right = GUTTER + chart.plot, text = `${(n * step).toFixed(digits)} ${name}`;
    context.textAlign = x > right - 24 ? "right" : "center";
    context.fillText(text, x > right - 24 ? Math.min(x + 12, right + RIGHT - 2) : x, AXIS / 2 - 2);
  }
}

function draw() {
  const start = performance.now();
  for (const chart of charts) if (chart.near) paint(chart);
  hover();
  drawn = performance.now() - start;
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}
