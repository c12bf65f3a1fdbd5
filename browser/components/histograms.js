// Draws histograms; dragging over one triggers "range" with {which, low, high}.
// data: {charts: [{which, title, help, bars: [[low, high, count]], log, counted, split, low, high}]}
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400, HEIGHT = 96, FOOT = 16, HEAD = 4;

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  return size >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toPrecision(2);
}

function ticks(low, high) {
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * step; t += step) {
    found.push(Math.abs(t) < 1e-9 * step ? 0 : Number(t.toPrecision(6)));
  }
  return found;
}

function draw(chart, setTriggerValue, tip) {
  const section = element("section", "chart");
  const head = element("div", "head");
  head.append(element("span", "title", chart.title));
  const note = element("span", "note", "");
  head.append(helpMark(chart.help, tip), note);
  const low = chart.bars[0][0], high = chart.bars[chart.bars.length - 1][1];
  const most = Math.max(...chart.bars.map((bar) => bar[2]), 1);
  const scale = chart.log ? (n) => Math.log1p(n) / Math.log1p(most) : (n) => n / most;
  const x = (value) => (WIDTH * (value - low)) / (high - low);
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + FOOT}`, class: "plot" });
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", chart.title);
  for (const [from, to, count] of chart.bars) {
    if (!count) continue;
    const tall = Math.max(1, (HEIGHT - HEAD) * scale(count));
    const kind = chart.split ? (from + to > 0 ? "bar up" : "bar down") : "bar on";
    svg.append(shape("rect", { x: x(from) + 0.5, width: Math.max(1, x(to) - x(from) - 1),
      y: HEIGHT - tall, height: tall, class: kind }));
  }
  svg.append(shape("line", { x1: 0, x2: WIDTH, y1: HEIGHT, y2: HEIGHT, class: "axis" }));
  for (const tick of ticks(low, high)) {
    const at = x(tick);
    const mark = shape("text", { x: Math.max(1, Math.min(WIDTH - 1, at)), y: HEIGHT + 12, class: "tick",
      "text-anchor": at < 8 ? "start" : at > WIDTH - 8 ? "end" : "middle" });
    mark.textContent = short(tick);
    svg.append(mark);
  }
  const brush = shape("rect", { y: 0, height: HEIGHT, x: 0, width: 0, class: "brush" });
  svg.append(brush);
  const place = (from, to) => {
    brush.setAttribute("x", x(Math.min(from, to)));
    brush.setAttribute("width", Math.abs(x(to) - x(from)));
  };
  if (chart.low !== null && chart.low !== undefined) place(chart.low, chart.high);
  const at = (event) => {
    const box = svg.getBoundingClientRect();
    return low + (high - low) * Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
  };
  let from = null;
  svg.onpointerdown = (event) => { from = at(event); svg.setPointerCapture(event.pointerId); };
  svg.onpointermove = (event) => {
    const here = at(event);
    if (from !== null) place(from, here);
    const bar = chart.bars.find(([a, b]) => here > a && here <= b) || chart.bars[0];
    note.textContent = `(${short(bar[0])}, ${short(bar[1])}] · ${bar[2].toLocaleString("en")} ${chart.counted}`;
  };
  svg.onpointerleave = () => { note.textContent = ""; };
  svg.onpointerup = (event) => {
    const to = at(event);
    const wide = Math.abs(to - from) > (high - low) / 100;
    const range = { which: chart.which, low: Math.min(from, to), high: Math.max(from, to) };
    from = null;
    setTriggerValue("range", wide ? range : { which: chart.which, low: null, high: null });
  };
  section.append(head, svg);
  return section;
}

export default function (component) {
  const { data, setTriggerValue } = component;
  const root = rootOf(component, "charts");
  const tip = element("div", "tip");
  root.replaceChildren(...data.charts.map((chart) => draw(chart, setTriggerValue, tip)), tip);
}
