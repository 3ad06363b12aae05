// Answers pointer and keys: zoom, pan, and what an instruction waited for.

// --- pointer and keys ----------------------------------------------------------------------------

function hover() {
  for (const chart of charts) {
    const context = chart.front.getContext("2d");
    context.setTransform(chart.ratio, 0, 0, chart.ratio, 0, 0);
    context.clearRect(0, 0, chart.width, chart.height);
    if (pointer && pointer.x >= GUTTER && pointer.x <= GUTTER + chart.plot) {
      context.fillStyle = theme.accent;
      context.globalAlpha = 0.55;
      context.fillRect(Math.round(pointer.x), AXIS - 6, 1, chart.height - AXIS - BOTTOM + 6);
      context.globalAlpha = 1;
    }
  }
  const found = pointer && at(pointer.chart, pointer.x, pointer.y);
  tip.hidden = !found;
  if (found) { outline(pointer.chart, found); showTip(found); }
}

function at(chart, x, y) {
  const device = Math.floor((y - AXIS) / chart.pitch);
  if (x < GUTTER || x > GUTTER + chart.plot) return null;
  if (device < 0 || device >= chart.timeline.devices.length) return null;
  const found = describe(chart.timeline, device, toSeconds(chart, x));
  return found && { ...found, device };
}

// Frames an instruction; returns where it begins and ends, and the middle of its row.
function frame(chart, context, device, i) {
  const d = chart.timeline.devices[device];
  const x = toX(chart, d.start[i]), end = toX(chart, d.end[i]), y = AXIS + device * chart.pitch;
  context.strokeRect(x, y, Math.max(end - x, 1), chart.row);
  return [x, end, y + chart.row / 2];
}

function over(chart, paint) {
  const context = chart.front.getContext("2d");
  context.save();
  context.beginPath();
  context.rect(GUTTER - 2, 0, chart.plot + 4, chart.height);
  context.clip();
  context.strokeStyle = context.fillStyle = theme.text;
  context.lineWidth = 2;
  paint(context);
  context.restore();
}

// Frames what is pointed at, what it waited for, and itself in the other timeline of a pair.
function outline(chart, found) {
  if (found.row === undefined) return;
  over(chart, (context) => {
    const mine = frame(chart, context, found.device, found.row);
    const source = dependency(chart.timeline, found.device, found.row);
    if (!source) return;
    const theirs = frame(chart, context, ...source);
    context.lineWidth = 1.5;
    context.beginPath();
    context.moveTo(theirs[1], theirs[2]);
    context.lineTo(mine[0], mine[2]);
    context.stroke();
    context.beginPath();
    context.arc(mine[0], mine[2], 3.5, 0, 7);
    context.fill();
  });
  const same = twin(chart.timeline, found.device, found.row);
  const other = same && charts.find((c) => c.timeline === same.timeline);
  if (other) over(other, (context) => frame(other, context, found.device, same.row));
}

function showTip(found) {
  const lines = [["b", "", found.head]];
  for (const line of found.lines) lines.push(["div", "", line]);
  for (const line of found.waits) lines.push(["div", "wait", line]);
  tip.replaceChildren(...lines.map(([tag, kind, text]) => {
    const element = document.createElement(tag);
    element.className = kind;
    element.textContent = text;
    return element;
  }));
  const box = pointer.chart.front.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const x = box.left + pointer.x + 16, y = box.top + pointer.y + 18;
  tip.style.left = `${Math.max(8, x + size.width > innerWidth - 8 ? x - size.width - 32 : x)}px`;
  tip.style.top = `${Math.max(8, y + size.height > innerHeight - 8 ? y - size.height - 36 : y)}px`;
}

function show(from, to) {
  const length = Math.min(Math.max(to - from, limit * 1e-7), limit);
  view.from = Math.min(Math.max(from, 0), limit - length);
  view.to = view.from + length;
  redraw();
}

function zoom(factor, seconds) {
  show(seconds - (seconds - view.from) / factor, seconds + (view.to - seconds) / factor);
}

function pan(share) {
  const by = share * (view.to - view.from);
  show(view.from + by, view.to + by);
}

function onWheel(chart, event) {
  const level = Math.abs(event.deltaX) > Math.abs(event.deltaY);
  const sideways = event.shiftKey ? event.deltaY || event.deltaX : level ? event.deltaX : 0;
  const everything = view.to - view.from >= limit;
  // With everything in view there is nothing to zoom out of: let the page scroll on.
  if (everything && (sideways || event.deltaY > 0)) return;
  event.preventDefault();
  const pixels = event.deltaMode === 1 ? 24 : 1;
  if (sideways) pan((sideways * pixels) / chart.plot);
  else zoom(Math.exp(-event.deltaY * pixels * 0.0018), toSeconds(chart, event.offsetX));
}

function onKey(event) {
  const middle = (view.from + view.to) / 2;
  const actions = {
    "+": () => zoom(1.5, middle), "=": () => zoom(1.5, middle), "-": () => zoom(1 / 1.5, middle),
    ArrowLeft: () => pan(-0.15), ArrowRight: () => pan(0.15),
    0: () => show(0, limit), Home: () => show(0, limit),
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
}

function listen(chart) {
  const { front } = chart;
  let held = null;
  front.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    held = { x: event.offsetX, from: view.from, to: view.to };
    front.classList.add("held");
    try { front.setPointerCapture(event.pointerId); } catch { /* the pointer has left already */ }
  });
  front.addEventListener("pointermove", (event) => {
    pointer = { chart, x: event.offsetX, y: event.offsetY };
    if (!held) { hover(); return; }
    // By whole columns, so that what is painted can move along.
    const columns = Math.round(((held.x - event.offsetX) / chart.plot) * chart.columns);
    const moved = (columns / chart.columns) * (held.to - held.from);
    show(held.from + moved, held.to + moved);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    front.addEventListener(name, () => { held = null; front.classList.remove("held"); });
  }
  front.addEventListener("pointerleave", () => { pointer = null; hover(); });
  front.addEventListener("dblclick", () => show(0, limit));
  front.addEventListener("wheel", (event) => onWheel(chart, event), { passive: false });
  front.addEventListener("keydown", onKey);
}

const charts = [...document.querySelectorAll(".chart")].map((box) => {
  const timeline = timelines[Number(box.dataset.timeline)];
  const [back, front] = box.querySelectorAll("canvas");
  const chart = { box, timeline, back, front, near: true };
  chart.base = data.colours.map(pixel);
  chart.fills = timeline.fills.map((row) => row.map(pixel));
  listen(chart);
  return chart;
});

// Charts far out of the window are painted when they come near, or on paper.
const watcher = new IntersectionObserver((changes) => {
  for (const change of changes) {
    charts.find((chart) => chart.box === change.target).near = change.isIntersecting;
  }
  redraw();
}, { rootMargin: "200px" });

function paintAll() {
  for (const chart of charts) paint(chart);
}

function restart() { readTheme(); charts.forEach(layout); paintAll(); hover(); }
window.addEventListener("beforeprint", paintAll);
window.addEventListener("resize", restart);
dark.addEventListener("change", restart);
restart();
for (const chart of charts) watcher.observe(chart.box);
const loaded = performance.now() - began;

// --- for tests -----------------------------------------------------------------------------------
// `#selftest=[["method", argument, ...], ...]` calls these and writes the answers into the page.

const chartOf = (number) => charts.find((chart) => chart.timeline === timelines[number]);
function send(chart, type, kind, values) {
  chart.front.dispatchEvent(new kind(type, { bubbles: true, cancelable: true, ...values }));
}
function spot(chart, x, y) {
  const box = chart.front.getBoundingClientRect();
  return { clientX: box.left + x, clientY: box.top + y };
}

window.adaptis = {
  state: () => ({
    ...view, limit, loaded, drawn,
    dense: charts.map((chart) => chart.dense), spans: timelines.map((t) => t.count),
  }),
  place: (number, device, seconds) => {
    const chart = chartOf(number);
    return [toX(chart, seconds), AXIS + (device + 0.5) * chart.pitch - chart.curve / 2];
  },
  hover: (number, x, y) => {
    send(chartOf(number), "pointermove", PointerEvent, spot(chartOf(number), x, y));
    return tip.hidden ? null : [...tip.children].map((element) => element.textContent);
  },
  point: (number, device, seconds) =>
    window.adaptis.hover(number, ...window.adaptis.place(number, device, seconds)),
  drag: (number, from, to) => {
    const chart = chartOf(number);
    send(chart, "pointerdown", PointerEvent, { ...spot(chart, from, 40), button: 0 });
    send(chart, "pointermove", PointerEvent, spot(chart, to, 40));
    send(chart, "pointerup", PointerEvent, spot(chart, to, 40));
    return { ...view };
  },
  wheel: (number, x, y, deltaY) => {
    send(chartOf(number), "wheel", WheelEvent, { ...spot(chartOf(number), x, y), deltaY });
    return { ...view };
  },
  key: (number, key) => {
    send(chartOf(number), "keydown", KeyboardEvent, { key });
    return { ...view };
  },
  double: (number) => {
    send(chartOf(number), "dblclick", MouseEvent, {});
    return { ...view };
  },
  frames: (count) => {
    const times = [];
    for (let i = 0; i < count; i++) {
      show((limit * i) / (2 * count), limit * (0.5 + i / (2 * count)));
      draw();
      times.push(drawn);
    }
    show(0, limit);
    return times;
  },
  // How many columns painting takes now, and how many pixels differ when all is painted anew.
  moved: (number) => {
    const chart = chartOf(number);
    paint(chart);
    const { painted, image } = chart;
    chart.image = null;
    paint(chart);
    const found = [chart.image, image].map((one) => new Uint32Array(one.data.buffer));
    return [painted, found[0].reduce((n, value, i) => n + (value !== found[1][i]), 0)];
  },
  pixel: (number, x, y) => {
    const chart = chartOf(number), context = chart.back.getContext("2d");
    paint(chart);
    const [column, line] = [x, y].map((at) => Math.round(at * chart.ratio));
    return [...context.getImageData(column, line, 1, 1).data];
  },
};

if (location.hash.startsWith("#selftest=")) {
  const output = document.createElement("pre");
  output.id = "selftest";
  let results;
  try {
    const calls = JSON.parse(decodeURIComponent(location.hash.slice("#selftest=".length)));
    results = calls.map(([name, ...values]) => window.adaptis[name](...values));
  } catch (error) {
    results = { error: String(error) };
  }
  draw();
  output.textContent = JSON.stringify(results);
  document.body.append(output);
}
