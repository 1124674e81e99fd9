"use strict";
const run = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (`on...` are listeners) and children; strings become text, never markup. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle"].includes(tag);
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
function short(x) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(x) >= size) return `${+(x / size).toPrecision(3)}${unit}`;
  }
  return tidy(x, 3);
}
function tidy(x, digits = 4) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3 || size >= 1e7) return x.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return size >= 1e4 ? whole(x) : String(+x.toPrecision(digits));
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

// ---------------------------------------------------------------- header
function header() {
  const state = run.status.state || "unknown";
  const done = run.total_images ? Math.min(1, run.images_seen / run.total_images) : null;
  const facts = [
    ["Images seen", whole(run.images_seen) + (run.total_images ? ` of ${whole(run.total_images)}` : "")],
    ["Progress", done === null ? "-" : `${(100 * done).toFixed(1)} %`],
    ["First record", date(run.first)],
    ["Last record", date(run.last)],
    ["Between them", run.first === null ? "-" : span(run.last - run.first)],
    ["Host", run.status.host || "-"],
  ];
  if (run.status.reason) facts.push(["Reason", run.status.reason]);
  document.title = `${run.experiment}/${run.name}: ${state}`;
  byId("header").append(
    make("div", { class: "top" },
      make("h1", {}, make("small", {}, run.experiment), run.name),
      make("span", { class: `state ${state}` }, state)),
    make("div", { class: "progress", role: "progressbar", "aria-valuenow": Math.round(100 * (done || 0)), "aria-label": "progress" },
      make("div", { style: `width:${100 * (done || 0)}%` })),
    make("dl", { class: "facts" }, facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
  byId("footer").append(`Written ${date(run.written)} from ${run.path}. Reload after the report has been written anew.`);
}

// ---------------------------------------------------------------- tables
function table(heads, rows) {
  const cell = (tag) => ([kind, ...content]) => make(tag, { class: kind }, ...content);
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, heads.map(cell("th")))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map(cell("td")))))));
}

function scores() {
  if (!run.scores.length) return nothing("No scores yet.");
  return table(
    [["", "Score"], ["number", "Newest"], ["number", "at images"], ["number", "First"], ["number", "at images"], ["", "Conditions"]],
    run.scores.map((score) => [
      ["mono", score.name], ["number", make("strong", {}, tidy(score.newest[1], 5))], ["number soft", whole(score.newest[0])],
      ["number", tidy(score.first[1], 5)], ["number soft", whole(score.first[0])],
      ["wrap", ...(Object.keys(score.conditions).length ? pairs(score.conditions) : [make("span", { class: "soft" }, "not recorded")])],
    ]));
}

function events() {
  if (!run.events.length) return nothing("Nothing recorded yet.");
  const rows = run.events.map(({ time, images_seen, event, ...fields }) => [
    ["soft number", date(time)], ["number", whole(images_seen)], ["mono", event], ["wrap", ...pairs(fields)]]);
  const all = table([["number", "Time"], ["number", "Images seen"], ["", "Event"], ["", "Details"]], rows);
  if (run.events_left_out) return [all, make("p", { class: "soft" }, `${whole(run.events_left_out)} older ones are in events.jsonl.`)];
  return all;
}

// ---------------------------------------------------------------- curves
const settings = { smooth: 0, log: false };
const charts = [];

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

function colour(i, count) {
  if (count === 1) return "var(--accent)";
  return `hsl(${Math.round(215 + (i * 165) / Math.max(1, count - 1)) % 360} 62% 54%)`;
}

class Chart {
  constructor(spec) {
    this.curves = spec.curves;
    this.log = false;
    this.value = make("div", { class: "value" });
    this.svg = make("svg", { role: "img", "aria-label": spec.title, onpointermove: (e) => this.hover(e), onpointerleave: () => this.rest() });
    this.button = make("button", { type: "button", "aria-pressed": "false", title: "logarithmic scale", onclick: () => this.setLog(!this.log) }, "log");
    this.readings = spec.curves.map(() => make("span", { class: "reading" }));
    const legend = make("div", { class: "legend" }, spec.curves.map((curve, i) =>
      make("span", {}, make("i", { style: `background:${colour(i, spec.curves.length)}` }), `${curve.name} `, this.readings[i])));
    this.node = make("div", { class: "chart" },
      make("div", { class: "head" }, make("b", { class: "mono" }, spec.title), this.button), this.value, this.svg,
      spec.curves.length > 1 ? legend : null);
  }

  setLog(on) {
    this.log = on;
    this.button.setAttribute("aria-pressed", String(on));
    this.draw();
  }

  draw() {
    const [width, height, left, right, top, bottom] = [this.svg.clientWidth || 380, 190, 48, 10, 8, 22];
    this.lines = this.curves.map((curve) => smoothed(curve.points, settings.smooth));
    const visible = ([, y]) => !this.log || y > 0;
    const all = [...this.lines.flat(), ...(settings.smooth ? [] : this.curves.flatMap((c) => c.points))].filter(visible);
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    if (!all.length) return this.rest();
    const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
    let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    if (x0 === x1) x1 = x0 + 1;
    if (this.log) [y0, y1] = y0 === y1 ? [y0 / 2, y1 * 2] : [y0 / 1.05, y1 * 1.05];
    else {
      const margin = (y1 - y0 || Math.abs(y0) || 1) * 0.06;
      [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - margin) : y0 - margin, y1 + margin];
    }
    const scale = this.log ? Math.log : (y) => y;
    this.x = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    this.y = (y) => height - bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0))) * (height - top - bottom);
    for (const y of this.log ? logSteps(y0, y1) : roundSteps(y0, y1, 5)) {
      this.svg.append(
        make("line", { class: "gridline", x1: left, x2: width - right, y1: this.y(y), y2: this.y(y) }),
        make("text", { x: left - 7, y: this.y(y) + 4, "text-anchor": "end" }, short(y)));
    }
    for (const x of roundSteps(x0, x1, width < 340 ? 3 : 5)) {
      const anchor = this.x(x) > width - 30 ? "end" : "middle";
      this.svg.append(make("text", { x: anchor === "end" ? width - right : this.x(x), y: height - 5, "text-anchor": anchor }, short(x)));
    }
    this.curves.forEach((curve, i) => {
      const stroke = colour(i, this.curves.length);
      const path = (points) => points.filter(visible).map((p, k) => `${k ? "L" : "M"}${this.x(p[0]).toFixed(1)} ${this.clamp(this.y(p[1]), top, height - bottom).toFixed(1)}`).join("");
      if (settings.smooth && this.curves.length === 1) this.svg.append(make("path", { class: "raw", style: `stroke:${stroke}`, d: path(curve.points) }));
      this.svg.append(make("path", { style: `stroke:${stroke}`, d: path(this.lines[i]) }));
      if (curve.points.length === 1) this.svg.append(make("circle", { cx: this.x(curve.points[0][0]), cy: this.y(curve.points[0][1]), r: 3, style: `fill:${stroke}` }));
    });
    this.cursor = make("g", {});
    this.svg.append(this.cursor);
    return this.rest();
  }

  clamp(y, low, high) { return Math.max(low, Math.min(high, y)); }

  rest() {
    if (this.cursor) this.cursor.replaceChildren();
    this.read(this.curves.map((curve) => curve.points.at(-1)), `${short(this.curves[0].points.at(-1)[0])} images`);
  }

  /** Say the values of `points`, one a curve: over the chart where there is one curve, in the legend where there are more. */
  read(points, place) {
    this.value.textContent = this.curves.length === 1 ? `${tidy(points[0][1], 5)} at ${place}` : `at ${place}`;
    points.forEach((point, i) => { this.readings[i].textContent = tidy(point[1], 3); });
  }

  hover(event) {
    if (!this.x) return;
    const px = event.clientX - this.svg.getBoundingClientRect().left;
    const near = this.lines.map((points) => points.reduce((best, p) => (Math.abs(this.x(p[0]) - px) < Math.abs(this.x(best[0]) - px) ? p : best)));
    const at = near.reduce((best, p) => (Math.abs(this.x(p[0]) - px) < Math.abs(this.x(best[0]) - px) ? p : best));
    this.cursor.replaceChildren(make("line", { class: "cursor", x1: this.x(at[0]), x2: this.x(at[0]), y1: 8, y2: 168 }),
      ...near.filter((p) => !this.log || p[1] > 0).map((p, i) => make("circle", { cx: this.x(p[0]), cy: this.clamp(this.y(p[1]), 8, 168), r: 3, style: `fill:${colour(i, this.curves.length)}` })));
    this.read(near, `${whole(at[0])} images`);
  }
}

function curves() {
  if (!run.charts.length) return nothing("No numbers yet.");
  const redraw = () => charts.forEach((chart) => chart.draw());
  const level = make("output", { class: "soft" }, "0");
  const controls = make("div", { class: "controls" },
    make("label", {}, "Smoothing", make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, oninput: (e) => {
      settings.smooth = Number(e.target.value);
      level.textContent = e.target.value;
      redraw();
    } }), level),
    make("label", {}, make("input", { type: "checkbox", onchange: (e) => charts.forEach((chart) => chart.setLog(e.target.checked)) }), "Logarithmic scale"),
    make("span", { class: "soft" }, "x axis: images seen"));
  const order = ["train", "val", "eval", "perf"];
  const rank = (group) => (order.includes(group) ? order.indexOf(group) : order.length);
  const groups = [...new Set(run.charts.map((chart) => chart.group))].sort((a, b) => rank(a) - rank(b));
  const drawn = groups.map((group) => {
    const own = run.charts.filter((chart) => chart.group === group).map((spec) => new Chart(spec));
    charts.push(...own);
    return [make("h3", {}, group), make("div", { class: "charts" }, own.map((chart) => chart.node))];
  });
  window.addEventListener("resize", redraw);
  return [controls, ...drawn.flat()];
}

// ---------------------------------------------------------------- pictures
function viewer({ name, pictures, left_out: leftOut }) {
  const image = make("img", { alt: name });
  const caption = make("figcaption");
  const position = make("span", { class: "soft" });
  const show = (i) => {
    image.src = pictures[i].url;
    image.className = pictures[i].width < 256 ? "small" : "";
    caption.textContent = pictures[i].caption;
    position.textContent = `${whole(pictures[i].images_seen)} images`;
  };
  const slider = make("input", { type: "range", min: 0, max: pictures.length - 1, step: 1, value: pictures.length - 1, "aria-label": `${name}, images seen`, oninput: (e) => show(Number(e.target.value)) });
  image.addEventListener("click", () => {
    const dialog = make("dialog", { onclick: () => dialog.close(), onclose: () => dialog.remove() }, make("img", { src: image.src, alt: name }));
    document.body.append(dialog);
    dialog.showModal();
  });
  show(pictures.length - 1);
  return make("figure", { class: "viewer" },
    make("div", { class: "head" }, make("b", { class: "mono" }, name), position),
    pictures.length > 1 ? make("div", { class: "slide" }, short(pictures[0].images_seen), slider, short(pictures.at(-1).images_seen)) : null,
    image, caption, leftOut ? make("figcaption", {}, `${leftOut} more in media/`) : null);
}

function media() {
  const shown = run.media.filter((item) => item.pictures.length);
  return shown.length ? make("div", { class: "viewers" }, shown.map(viewer)) : nothing("No pictures yet.");
}

// ---------------------------------------------------------------- the page
function config() {
  if (!Object.keys(run.config).length) return nothing("config.json is not there yet.");
  return make("details", {}, make("summary", {}, "Show the resolved configuration"), make("pre", {}, JSON.stringify(run.config, null, 2)));
}

function files() {
  const known = run.files.length
    ? table([["", "File"], ["", "What it is"]], run.files.map((file) => [["mono wrap", file.path], ["", file.what]])) : nothing("No files yet.");
  return run.commands.length ? [known, make("h3", {}, "Next commands"), make("pre", {}, run.commands.join("\n"))] : known;
}

header();
for (const [id, build] of Object.entries({ scores, media, curves, events, config, files })) {
  const section = byId(id);
  section.append(make("h2", {}, section.dataset.title), ...[build()].flat());
  byId("nav").append(make("a", { href: `#${id}` }, section.dataset.title));
}
charts.forEach((chart) => chart.draw());
