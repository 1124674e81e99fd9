"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const runs = page.runs;
const several = runs.length > 1;
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (`on...` are listeners) and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle", "rect", "title"].includes(tag);
  const node = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

// ---------------------------------------------------------------- numbers and dates
const whole = (n) => Math.round(n).toLocaleString("en-US");
function short(x, digits = 3) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(x) >= size) return `${+(x / size).toPrecision(digits)}${unit}`;
  }
  return tidy(x, digits);
}
function tidy(x, digits = 4) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3 || size >= 1e7) return x.toExponential(Math.max(2, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  return size >= 1e4 ? whole(x) : String(+x.toPrecision(digits));
}
/** Ticks in words, with as many digits as tell them apart. */
function told(ticks) {
  const words = (digits) => ticks.map((tick) => short(tick, digits));
  return words([3, 4, 5, 6, 7].find((digits) => new Set(words(digits)).size === ticks.length) || 8);
}
const date = (seconds) => (seconds === null || seconds === undefined
  ? "-" : new Date(seconds * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }));
function span(seconds) {
  const [d, h, m] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${Math.round(seconds) % 60} s` : `${Math.round(seconds)} s`;
}
const plain = (value) => (typeof value === "number" ? tidy(value, 6) : typeof value === "string" ? value : JSON.stringify(value));
const leaves = (value, name) => (value !== null && typeof value === "object" && !Array.isArray(value)
  ? Object.entries(value).flatMap(([inner, part]) => leaves(part, name ? `${name}.${inner}` : inner)) : [[name, value]]);
const abridged = (text) => (/^[0-9a-f]{24,}$/.test(text) ? `${text.slice(0, 12)}...` : text);
const pairs = (fields) => leaves(fields, "").map(([name, value]) =>
  make("span", { class: "pair", title: plain(value) }, make("b", {}, `${name} `), abridged(plain(value))));
const nothing = (text) => make("p", { class: "empty" }, text);

const label = (run) => (several && runs.every((other) => other.experiment === run.experiment) ? run.name : `${run.experiment}/${run.name}`);
/** How curve or run number i is drawn: 7 colours that most eyes tell apart (Okabe and Ito 2008), 4 kinds of dashes. */
const kind = (i) => `stroke:var(--c${i % 7});stroke-dasharray:${["none", "7 3", "2 2.5", "8 3 2 3"][i % 4]}`;
/** Number i of several that have an order, such as ranges of timesteps. */
const step = (i, count) => `stroke:color-mix(in oklab, var(--high) ${Math.round((100 * i) / Math.max(1, count - 1))}%, var(--low))`;
const swatch = (style) => make("svg", { class: "swatch", viewBox: "0 0 24 4" }, make("line", { x1: 1, x2: 23, y1: 2, y2: 2, style }));
const titled = (run, i, ...content) => (several ? [make("h3", {}, swatch(kind(i)), label(run)), ...content.flat()] : content.flat());

// ---------------------------------------------------------------- header
const share = (run) => (run.total_images ? Math.min(1, run.images_seen / run.total_images) : null);
function state(run) {
  return make("span", { class: `state ${run.state}`, title: run.status.reason || "" }, run.state);
}

/** What is known of how a run stands, as [name, text]. */
function facts(run) {
  const done = share(run);
  const spent = run.clock.length ? run.clock.at(-1) : null;
  const rate = run.state === "running" && "perf/images_per_s" in run.curves ? run.curves["perf/images_per_s"].at(-1)[1] : null;
  const code = run.launches.length ? run.launches.at(-1).code : null;
  const { spent: hours, at_completion: end, planned, price } = run.cost;
  const cost = (factor) => [tidy(factor * hours, 3), ...(end && done < 1 ? [`${tidy(factor * end, 3)} at completion`] : []),
    ...(planned ? [`${tidy(factor * planned, 3)} planned`] : [])].join(", ");
  return [
    ["Images seen", whole(run.images_seen) + (run.total_images ? ` of ${whole(run.total_images)}` : "")],
    ["Progress", done === null ? "-" : `${(100 * done).toFixed(1)} %`],
    ["Left, at the last rate", rate && run.total_images ? span((run.total_images - run.images_seen) / rate) : "-"],
    ["GPU hours", spent ? cost(1) : "-"],
    ...(runs.some((other) => other.cost.price) ? [["Cost", spent && price ? cost(price) : "-"]] : []),
    ["Since the first launch", spent ? span(3600 * spent[2]) : "-"],
    ["Launches", String(run.launches.length || "-")],
    ["First record", date(run.first)],
    ["Last record", date(run.last)],
    ["Newest checkpoint", run.saved ? `${span(Math.max(0, page.written - run.saved))} before this page` : "none"],
    ["Alerts", String(run.alerts)],
    ["Host", run.status.host || "-"],
    ["Code", code ? `${code.commit.slice(0, 10)}${code.dirty ? ", changed" : ""}` : "-"],
    ...(run.status.reason ? [["Reason", run.status.reason]] : []),
  ];
}

function header() {
  if (several) {
    document.title = runs.map(label).join(", ");
    byId("header").append(make("h1", {}, make("small", {}, "side by side"), `${runs.length} runs`));
    const names = facts(runs[0]).map(([name]) => name).filter((name) => name !== "Reason");
    const rows = runs.map((run, i) => [["mono name", swatch(kind(i)), label(run)], ["", state(run)],
      ...names.map((name) => ["number", facts(run).find((fact) => fact[0] === name)[1]])]);
    byId("header").append(make("div", { class: "below" }, table([["", "Run"], ["", "State"], ...names.map((name) => ["number", name])], rows)));
  } else {
    const run = runs[0];
    const done = share(run) || 0;
    document.title = `${run.experiment}/${run.name}: ${run.state}`;
    byId("header").append(
      make("div", { class: "top" }, make("h1", {}, make("small", {}, run.experiment), run.name), state(run)),
      make("div", { class: "progress", role: "progressbar", "aria-valuenow": Math.round(100 * done), "aria-label": "progress" },
        make("div", { style: `width:${100 * done}%` })),
      make("dl", { class: "facts" }, facts(run).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
  }
  byId("footer").append(`Written ${date(page.written)} from ${runs.map((run) => run.path).join(", ")}. Reload after the page has been written anew.`);
}

// ---------------------------------------------------------------- tables
/** Heads and rows of cells [class, content ...]; a row of one cell is a heading across the table. */
function table(heads, rows) {
  const cell = (tag) => ([kind, ...content]) => make(tag, { class: kind }, ...content);
  const across = ([[, ...content]]) => make("td", { class: "across", colspan: heads.length }, ...content);
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, heads.map(cell("th")))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.length > 1 ? row.map(cell("td")) : across(row))))));
}

function differences() {
  if (!page.differences.length) return nothing("The configurations are the same.");
  return table([["", "Key"], ...runs.map((run, i) => ["", swatch(kind(i)), label(run)])],
    page.differences.map(({ key, values }) => [["mono", key], ...values.map((value) => ["mono wrap", plain(value)])]));
}

/** A row for each score of each run, under what it depends on. */
function scores() {
  const all = runs.flatMap((run, i) => run.scores.map((score) => ({ run, i, ...score })));
  if (!all.length) return nothing("No scores yet.");
  all.sort((a, b) => a.name.localeCompare(b.name));  // stable: runs keep their order
  const groups = Map.groupBy(all, (score) => JSON.stringify(score.conditions));
  const row = ({ run, i, name, newest, first }) => [
    ["mono", name], ...(several ? [["mono name", swatch(kind(i)), label(run)]] : []),
    ["number", make("strong", {}, tidy(newest[1], 5))], ["number soft", whole(newest[0])],
    ["number", tidy(first[1], 5)], ["number soft", whole(first[0])]];
  const known = (scores) => Object.keys(scores[0].conditions).length > 0;
  const ordered = [...groups.values()].sort((a, b) => known(b) - known(a));
  return table([["", "Score"], ...(several ? [["", "Run"]] : []), ["number", "Newest"], ["number", "at images"],
    ["number", "First"], ["number", "at images"]], ordered.flatMap((scores) => [
    [["", ...(known(scores) ? pairs(scores[0].conditions) : ["conditions not recorded"])]], ...scores.map(row)]));
}

/** What `evaluate.py` wrote: a table for each file, a row for each strength of guidance, and its picture. */
function evaluations(run) {
  return run.evaluations.flatMap(({ name, rows, conditions }) => {
    const names = [...new Set(rows.flatMap((row) => Object.keys(row.scores)))];
    const cells = rows.map((row) => [["name", row.name], ...names.map((score) => ["number", score in row.scores ? plain(row.scores[score]) : ""])]);
    return [make("h4", { class: "mono" }, `${name}.json`), make("p", { class: "soft" }, ...pairs(conditions)),
      table([["", ""], ...names.map((score) => ["number", score.replace("eval/", "")])], cells), make("div", { class: "viewers" }, viewer(name, "", [run]))];
  });
}

function events(run) {
  if (!run.events.length) return [nothing("Nothing recorded yet.")];
  const rows = run.events.map(({ time, images_seen, event, ...fields }) => [
    ["soft number", date(time)], ["number", whole(images_seen)], ["mono", event], ["wrap", ...pairs(fields)]]);
  const all = table([["number", "Time"], ["number", "Images seen"], ["", "Event"], ["", "Details"]], rows);
  const older = make("p", { class: "soft" }, `${whole(run.events_left_out)} older ones are in events.jsonl.`);
  return run.events_left_out ? [all, older] : [all];
}

function launches(run) {
  if (!run.launches.length) return [nothing("repro.json is not there yet.")];
  const rows = run.launches.map(({ time, images_seen, host, ...rest }) => [
    ["soft number", date(time)], ["number", whole(images_seen)], ["mono", host], ["wrap", ...pairs(rest)]]);
  const all = table([["number", "Launched"], ["number", "At images"], ["", "Host"], ["", "Engine, code, data, packages"]], rows);
  const older = make("p", { class: "soft" }, `${whole(run.launches_left_out)} older ones are in repro.json.`);
  return run.launches_left_out ? [all, older] : [all];
}

// ---------------------------------------------------------------- curves
const AXES = { images: "images seen", gpu_hours: "GPU hours", hours: "hours since the first launch" };
const MARKED = { resume: "resumed", rollback: "rolled back", trouble: "trouble", save_failed: "save failed", failed: "failed" };
const settings = { smooth: 0, axis: "images" };
const charts = [];

/** Where `images` lies on the chosen axis. */
function along(run, images) {
  const place = settings.axis === "gpu_hours" ? 1 : 2;
  if (settings.axis === "images" || !run.clock.length) return images;
  const after = run.clock.findIndex((tick) => tick[0] >= images);
  if (after <= 0) return run.clock.at(after)[place];
  const [before, next] = [run.clock[after - 1], run.clock[after]];
  return before[place] + ((images - before[0]) / (next[0] - before[0])) * (next[place] - before[place]);
}

/** Exponential moving average with the early bias taken out; `weight` in 0..1 of what came before. Short curves stay. */
function smoothed(points, weight) {
  if (!weight || points.length < 50) return points;
  let mean = 0, mass = 0;
  return points.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    mass = weight * mass + (1 - weight);
    return [x, mean / mass];
  });
}

function roundSteps(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k += 1) ticks.push(k * step);
  return ticks;
}

function logSteps(low, high) {
  if (high / low < 3) return roundSteps(low, high, 4);
  const ticks = [];
  const decades = Math.log10(high / low);
  const digits = decades > 2.5 ? [1] : decades > 1 ? [1, 3] : [1, 2, 3, 5, 7];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p += 1) {
    for (const digit of digits) if (digit * 10 ** p >= low * 0.999 && digit * 10 ** p <= high * 1.001) ticks.push(digit * 10 ** p);
  }
  const every = Math.ceil(ticks.length / 6);
  return ticks.filter((_, i) => i % every === 0);
}

/** How the curves of a chart are drawn: those of one run by timestep from low to high, others by their number. */
function kinds(curves) {
  const ordered = curves.length > 4 && curves.every((curve) => /^t\d{3}$/.test(curve.name));
  return curves.map((curve, i) => (several ? kind(runs.indexOf(curve.run)) : ordered ? step(i, curves.length) : kind(i)));
}

/** Names without what they all begin with, up to a / or _. */
function shortened(names) {
  let common = names[0];
  for (const name of names) while (!name.startsWith(common)) common = common.slice(0, -1);
  if (names.length === 1 || names.includes(common)) common = names[0].slice(0, names[0].lastIndexOf("/") + 1);
  const cut = Math.max(common.lastIndexOf("/"), common.lastIndexOf("_")) + 1;
  return names.map((name) => name.slice(cut));
}

class Chart {
  /** `curves`: [{name, run, points: [[images, value], ...]}], none without points; `levels`: [{label, value}]. */
  constructor(title, act, curves, levels) {
    this.levels = levels;
    const styles = kinds(curves);
    this.curves = curves.map((curve, i) => ({ ...curve, style: styles[i], hidden: false }));
    this.log = false;
    this.zoom = null;
    this.value = make("div", { class: "value" });
    this.svg = make("svg", { role: "img", "aria-label": title,
      onpointermove: (e) => this.hover(e), onpointerleave: () => this.rest(), onpointerdown: (e) => this.press(e),
      onpointerup: (e) => this.release(e), onpointercancel: () => this.cancel(), ondblclick: () => this.zoomTo(null) });
    this.button = make("button", { type: "button", "aria-pressed": "false", title: "logarithmic scale", onclick: () => this.setLog(!this.log) }, "log");
    this.whole = make("button", { type: "button", hidden: "", onclick: () => this.zoomTo(null) }, "whole");
    this.readings = this.curves.map(() => make("span", { class: "reading" }));
    const entry = (curve, i) => make("button", { type: "button", "aria-pressed": "true", title: "show or hide", onclick: (e) => this.toggle(i, e.currentTarget) },
      swatch(curve.style), `${curve.name} `, this.readings[i]);
    this.node = make("div", { class: "chart" },
      make("div", { class: "head" }, make("b", { title: act ? `act when: ${act}` : "" }, title), make("span", {}, this.whole, this.button)),
      this.value, this.svg, this.curves.length > 1 ? make("div", { class: "legend" }, this.curves.map(entry)) : null);
  }

  setLog(on) {
    this.log = on;
    this.button.setAttribute("aria-pressed", String(on));
    this.draw();
  }

  toggle(i, button) {
    this.curves[i].hidden = !this.curves[i].hidden;
    button.setAttribute("aria-pressed", String(!this.curves[i].hidden));
    this.draw();
  }

  zoomTo(range) {
    this.zoom = range;
    this.whole.toggleAttribute("hidden", range === null);
    this.draw();
  }

  draw() {
    const [width, height, left, right, top, bottom] = [this.svg.clientWidth || 380, 190, 48, 10, 8, 22];
    this.edges = [left, width - right];
    const placed = ({ run }, points) => points.map(([images, y]) => [along(run, images), y]);
    this.raw = this.curves.map((curve) => placed(curve, curve.points));
    this.lines = this.curves.map((curve) => placed(curve, smoothed(curve.points, settings.smooth)));
    const within = ([x]) => !this.zoom || (x >= this.zoom[0] && x <= this.zoom[1]);
    const visible = (point) => within(point) && (!this.log || point[1] > 0);
    const shown = (_, i) => !this.curves[i].hidden;
    const all = [...this.lines.filter(shown).flat(), ...(settings.smooth ? [] : this.raw.filter(shown).flat())].filter(visible);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.x = null;
    this.cursor = make("g", {});
    if (!all.length) return this.rest();
    const span = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    let [[x0, x1], [y0, y1]] = [this.zoom || span(all.map((p) => p[0])), span([...all.map((p) => p[1]), ...this.levels.map((level) => level.value)])];
    if (x0 === x1) x1 = x0 + 1;
    if (this.log) [y0, y1] = y0 === y1 ? [y0 / 2, y1 * 2] : [y0 / 1.05, y1 * 1.05];
    else {
      const margin = (y1 - y0 || Math.abs(y0) || 1) * 0.06;
      [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - margin) : y0 - margin, y1 + margin];
    }
    const scale = this.log ? Math.log : (y) => y;
    this.x = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    this.back = (px) => x0 + ((px - left) / (width - left - right)) * (x1 - x0);
    this.y = (y) => height - bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (height - top - bottom);
    const [across, up] = [roundSteps(x0, x1, width < 340 ? 3 : 5), this.log ? logSteps(y0, y1) : roundSteps(y0, y1, 5)];
    const [acrossTold, upTold] = [told(across), told(up)];
    up.forEach((y, i) => this.svg.append(
      make("line", { class: "gridline", x1: left, x2: width - right, y1: this.y(y), y2: this.y(y) }),
      make("text", { x: left - 7, y: this.y(y) + 4, "text-anchor": "end" }, upTold[i])));
    across.forEach((x, i) => {
      const anchor = this.x(x) > width - 30 ? "end" : "middle";
      this.svg.append(make("text", { x: anchor === "end" ? width - right : this.x(x), y: height - 5, "text-anchor": anchor }, acrossTold[i]));
    });
    for (const { label: text, value } of this.levels) {
      this.svg.append(make("line", { class: "level", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }),
        make("text", { class: "held", x: width - right, y: this.y(value) - 4, "text-anchor": "end" }, `${text}: ${tidy(value)}`));
    }
    if (!several) this.mark(x0, x1, top, height - bottom);
    this.curves.forEach((curve, i) => {
      if (curve.hidden) return;
      const path = (points) => points.filter(visible).map((p, k) => `${k ? "L" : "M"}${this.x(p[0]).toFixed(1)} ${this.clamp(this.y(p[1]), top, height - bottom).toFixed(1)}`).join("");
      if (settings.smooth && (several || this.curves.length === 1)) this.svg.append(make("path", { class: "raw", style: curve.style, d: path(this.raw[i]) }));
      this.svg.append(make("path", { style: curve.style, d: path(this.lines[i]) }));
      const points = this.lines[i].filter(visible);
      if (points.length < 8) this.svg.append(...points.map(([x, y]) => make("circle", { cx: this.x(x), cy: this.y(y), r: 2.5, style: curve.style })));
    });
    this.svg.append(this.cursor);
    return this.rest();
  }

  /** A line where something happened to the run. */
  mark(x0, x1, top, bottom) {
    for (const event of runs[0].events) {
      const x = along(runs[0], event.images_seen);
      if (!(event.event in MARKED) || x < x0 || x > x1) continue;
      this.svg.append(make("line", { class: `mark ${event.event}`, x1: this.x(x), x2: this.x(x), y1: top, y2: bottom },
        make("title", {}, `${MARKED[event.event]} at ${whole(event.images_seen)} images`)));
    }
  }

  clamp(y, low, high) { return Math.max(low, Math.min(high, y)); }

  rest() {
    this.cursor.replaceChildren();
    this.read(this.lines.map((points) => points.at(-1)), `${short(Math.max(...this.lines.map((points) => points.at(-1)[0])))} ${AXES[settings.axis]}`);
  }

  /** Say the values of `points`, one a curve: over the chart where there is one curve, in the legend where there are more. */
  read(points, place) {
    this.value.textContent = this.curves.length === 1 ? `${tidy(points[0][1], 5)} at ${place}` : `at ${place}`;
    points.forEach((point, i) => { this.readings[i].textContent = tidy(point[1], 3); });
  }

  at(event) { return this.clamp(event.clientX - this.svg.getBoundingClientRect().left, ...this.edges); }

  press(event) {
    if (!this.x || event.pointerType !== "mouse") return;
    this.svg.setPointerCapture(event.pointerId);  // so that letting go beside the chart is heard
    this.pressed = this.at(event);
  }

  cancel() {
    this.pressed = undefined;
    this.rest();
  }

  release(event) {
    const [from, to] = [this.pressed, this.at(event)];
    this.pressed = undefined;
    if (from !== undefined && Math.abs(to - from) > 6) this.zoomTo([this.back(Math.min(from, to)), this.back(Math.max(from, to))]);
  }

  hover(event) {
    if (!this.x) return;
    const px = this.at(event);
    const nearer = (best, p) => (Math.abs(this.x(p[0]) - px) < Math.abs(this.x(best[0]) - px) ? p : best);
    const near = this.lines.map((points) => points.reduce(nearer));
    const at = near.filter((_, i) => !this.curves[i].hidden).reduce(nearer);
    const dragged = this.pressed === undefined ? [] : [make("rect", { class: "drag", x: Math.min(px, this.pressed), width: Math.abs(px - this.pressed), y: 8, height: 160 })];
    const dots = this.curves.map((curve, i) => [curve, near[i]]).filter(([curve, p]) => !curve.hidden && (!this.log || p[1] > 0));
    this.cursor.replaceChildren(...dragged, make("line", { class: "cursor", x1: this.x(at[0]), x2: this.x(at[0]), y1: 8, y2: 168 }),
      ...dots.map(([curve, p]) => make("circle", { cx: this.x(p[0]), cy: this.clamp(this.y(p[1]), 8, 168), r: 3, style: curve.style })));
    this.read(near, `${settings.axis === "images" ? whole(at[0]) : tidy(at[0], 3)} ${AXES[settings.axis]}`);
  }
}

/** What these names are held against, each level once. */
function levelsOf(names) {
  const all = runs.flatMap((run) => run.levels.filter((level) => names.includes(level.name)));
  return [...new Map(all.map((level) => [`${level.label} ${level.value}`, level])).values()];
}

/** One run: a chart for the panel. Several: one for each of its names, a curve for each run. */
function chartsOf(panel) {
  const names = panel.names.filter((name) => runs.some((run) => name in run.curves));
  const curves = (name, shown) => runs.filter((run) => name in run.curves).map((run) => ({ name: shown || label(run), run, points: run.curves[name] }));
  if (!names.length) return [];
  if (!several) return [new Chart(panel.title, panel.act, shortened(names).flatMap((short, i) => curves(names[i], short)), levelsOf(names))];
  return names.map((name) => new Chart(names.length > 1 ? `${panel.title.split(" ")[0]} ${name}` : panel.title, panel.act, curves(name), levelsOf([name])));
}

/** Validation loss by timestep over training, as a map: the newest column on the right, high timesteps on top. */
function heat(run) {
  const names = Object.keys(run.curves).filter((name) => /^val\/loss_t\d{3}$/.test(name)).sort();
  if (!names.length || run.curves[names[0]].length < 2) return [];
  const log = (y) => Math.log(Math.max(y, 1e-12));
  const all = names.flatMap((name) => run.curves[name]);
  const [low, high] = [Math.min(...all.map((p) => log(p[1]))), Math.max(...all.map((p) => log(p[1])))];
  const moments = [...new Set(all.map((p) => p[0]))].sort((a, b) => a - b);
  const [first, end] = [moments[0], 2 * moments.at(-1) - moments.at(-2)];  // the newest lasts as long as the one before
  const [left, width, tall] = [48, 332, 16];
  const place = (images) => left + (width * (images - first)) / (end - first);
  const svg = make("svg", { role: "img", viewBox: "0 0 380 190", preserveAspectRatio: "none", "aria-label": "validation loss by timestep" });
  names.forEach((name, row) => {
    const top = 8 + (names.length - 1 - row) * tall;
    svg.append(make("text", { x: left - 7, y: top + 12, "text-anchor": "end" }, `t ${Number(name.slice(-3))}`));
    run.curves[name].forEach(([images, y], i, points) => {
      const heat = (log(y) - low) / (high - low || 1);
      const until = i + 1 < points.length ? points[i + 1][0] : end;
      svg.append(make("rect", { x: place(images), y: top, width: place(until) - place(images) + 0.3, height: tall, style: `fill:hsl(${Math.round(230 - 190 * heat)} 70% ${Math.round(28 + 34 * heat)}%)` },
        make("title", {}, `${name}: ${tidy(y)} at ${whole(images)} images`)));
    });
  });
  svg.append(make("text", { x: left, y: 185 }, short(first)), make("text", { x: 380, y: 185, "text-anchor": "end" }, short(moments.at(-1))));
  return [make("div", { class: "chart" },
    make("div", { class: "head" }, make("b", {}, `C12 Map of timesteps${several ? `, ${label(run)}` : ""}`)),
    make("div", { class: "value" }, `${tidy(Math.exp(low), 3)} (blue) to ${tidy(Math.exp(high), 3)} (yellow), by images seen`), svg)];
}

function controls() {
  const redraw = () => charts.forEach((chart) => chart.draw());
  const level = make("output", { class: "soft" }, "0");
  window.addEventListener("resize", redraw);
  byId("controls").append(
    make("label", {}, "Smoothing", make("input", { id: "smoothing", type: "range", min: 0, max: 0.98, step: 0.02, value: 0, oninput: (e) => {
      settings.smooth = Number(e.target.value);
      level.textContent = e.target.value;
      redraw();
    } }), level),
    make("label", {}, make("input", { id: "log", type: "checkbox", onchange: (e) => charts.forEach((chart) => chart.setLog(e.target.checked)) }), "Logarithmic"),
    make("label", {}, "Over", make("select", { id: "axis", onchange: (e) => {
      settings.axis = e.target.value;
      charts.forEach((chart) => chart.zoomTo(null));
    } }, Object.entries(AXES).map(([value, words]) => make("option", { value }, words)))),
    make("span", { class: "soft" }, "Drag over a chart to zoom; a click in a legend hides a curve."));
}

// ---------------------------------------------------------------- pictures
/** Show a picture at its full size, until a click or Escape. */
function enlarge(image) {
  const dialog = make("dialog", { onclick: () => dialog.close(), onclose: () => dialog.remove() }, make("img", { src: image.src, alt: image.alt }));
  document.body.append(dialog);
  dialog.showModal();
}

/** One name's pictures of these runs, under one slider over images seen; and what is not shown of them. */
function viewer(name, title, those = runs) {
  const held = those.map((run) => ({ run, i: runs.indexOf(run), ...run.media.find((item) => item.name === name) }));
  const sets = held.filter((set) => set.pictures && set.pictures.length);
  const notes = held.filter((set) => set.left_out).map((set) => make("p", { class: "note" },
    `${those.length > 1 ? `${label(set.run)}: ` : ""}${set.left_out} of ${set.left_out + set.pictures.length} pictures are not on this page: see ${set.run.path}`));
  if (!sets.length) return notes.length ? [make("figure", { class: "viewer" }, make("div", { class: "head" }, make("b", {}, title)), notes)] : [];
  const stops = [...new Set(sets.flatMap((set) => set.pictures.map((picture) => picture.images_seen)))].sort((a, b) => a - b);
  const position = make("span", { class: "soft" });
  const shown = sets.map(({ run, i, pictures }) => {
    const [image, caption] = [make("img", { alt: `${name} of ${label(run)}` }), make("figcaption")];
    const button = make("button", { type: "button", class: "enlarge", title: "enlarge", onclick: () => enlarge(image) }, image);
    const show = (images) => {
      const picture = pictures.findLast((one) => one.images_seen <= images) || pictures[0];
      image.src = picture.url;
      image.className = picture.width < 256 ? "small" : "";
      const seed = run.config.seed === undefined ? "" : `, seed ${run.config.seed}`;
      const which = those.length > 1 ? `${label(run)} at ${whole(picture.images_seen)} images${seed}: ` : "";
      const packed = picture.width < picture.drawn ? ` (${picture.width} of ${picture.drawn} pixels across)` : "";
      caption.replaceChildren(...(those.length > 1 ? [swatch(kind(i))] : []), which + picture.caption + packed);
    };
    return { show, node: make("div", {}, button, caption) };
  });
  const show = (stop) => {
    position.textContent = stops[stop] === null ? "" : `${whole(stops[stop])} images`;
    shown.forEach((one) => one.show(stops[stop]));
  };
  const slider = make("input", { type: "range", min: 0, max: stops.length - 1, step: 1, value: stops.length - 1, "aria-label": `${name}, images seen`, oninput: (e) => show(Number(e.target.value)) });
  show(stops.length - 1);
  return [make("figure", { class: those.length > 1 ? "viewer wide" : "viewer" },
    make("div", { class: "head" }, make("b", {}, title), position),
    stops.length > 1 ? make("div", { class: "slide" }, short(stops[0]), slider, short(stops.at(-1))) : null,
    make("div", { class: "sides" }, shown.map((one) => one.node)), notes)];
}

// ---------------------------------------------------------------- the page
function config(run) {
  if (!Object.keys(run.config).length) return [nothing("config.json is not there yet.")];
  return [make("details", {}, make("summary", {}, "Show the resolved configuration"), make("pre", {}, JSON.stringify(run.config, null, 2)))];
}

function files(run) {
  if (!run.files.length) return [nothing("No files yet.")];
  const known = table([["", "File"], ["", "What it is"]], run.files.map((file) => [["mono wrap", make("a", { href: file.link }, file.path)], ["", file.what]]));
  return run.commands.length ? [known, make("h3", {}, "Next commands"), make("pre", {}, run.commands.join("\n"))] : [known];
}

function section(id, title, content) {
  byId("sections").append(make("section", { id }, make("h2", {}, title), content));
  byId("nav").append(make("a", { href: `#${id}` }, title));
}

/** The charts and pictures of one of the dashboard's sections, in the order of its panels. */
function panels(title) {
  const own = page.panels.filter((panel) => panel.section === title);
  const drawn = own.flatMap(chartsOf);
  charts.push(...drawn);
  const maps = title.startsWith("C.") ? runs.flatMap(heat) : [];
  const nodes = [...drawn.map((chart) => chart.node), ...maps];
  const pictures = own.flatMap((panel) => panel.names.flatMap((name, i) => viewer(name, panel.names.length > 1 ? `${panel.title}: ${shortened(panel.names)[i]}` : panel.title)));
  const evaluated = title.startsWith("D.") ? runs.flatMap((run, i) => (run.evaluations.length ? titled(run, i, evaluations(run)) : [])) : [];
  return [title.startsWith("D.") ? scores() : null, ...evaluated, pictures.length ? make("div", { class: "viewers" }, pictures) : null,
    nodes.length ? make("div", { class: "charts" }, nodes) : null].filter((part) => part !== null);
}

header();
controls();
if (several) section("differences", "Configuration differences", differences());
const titles = new Set(page.panels.map((panel) => panel.section));
if (runs.some((run) => run.evaluations.length)) titles.add("D. Pictures and scores");
for (const title of [...titles].sort()) section(title[0] === "O" ? "others" : title[0], title, panels(title));
for (const [id, title, build] of [["events", "Events", events], ["launches", "Launches and environment", launches], ["config", "Configuration", config], ["files", "Files and next commands", files]]) {
  section(id, title, runs.flatMap((run, i) => titled(run, i, build(run))));
}
charts.forEach((chart) => chart.draw());
