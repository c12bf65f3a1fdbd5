// A map of features on a canvas: hover shows one, a click opens it, the wheel zooms, a drag moves.
// data: {xy: base64 float32 [n, 2], colour: base64 float32 [n] in 0…1 or NaN, faint: base64 uint8 [n],
//        notes: [[name, one text per feature]], names: [{x, y, text}], chosen, scale: {title, low, high}, height}
function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out.buffer;
}

// cividis-like: dark blue → grey → yellow, readable without colour vision, on light and on dark
const LIGHT = [[20, 48, 110], [64, 99, 142], [128, 132, 130], [193, 152, 74], [226, 122, 10]];
const DARK = [[86, 134, 214], [110, 140, 175], [150, 152, 148], [214, 172, 84], [250, 150, 40]];

function ramp(stops, t) {
  const at = Math.max(0, Math.min(0.9999, t)) * (stops.length - 1), i = Math.floor(at), f = at - i;
  const mix = stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * f));
  return `rgb(${mix.join(",")})`;
}

function isDark(node) {
  const shown = getComputedStyle(node).getPropertyValue("--st-background-color").trim();
  const context = element("canvas").getContext("2d");
  context.fillStyle = shown || "#fff";
  const hex = context.fillStyle;
  return parseInt(hex.slice(1, 3), 16) < 128;
}

class Map2d {
  constructor(root, data, open) {
    this.root = root;
    this.open = open;
    this.canvas = element("canvas", "plane");
    this.tip = element("div", "tip");
    this.legend = element("div", "legend");
    root.replaceChildren(this.canvas, this.legend, this.tip);
    this.view = { x: 0, y: 0, zoom: 1 };
    this.update(data);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(root);
  }

  update(data) {
    this.data = data;
    this.xy = new Float32Array(bytes(data.xy));
    this.colour = new Float32Array(bytes(data.colour));
    this.faint = new Uint8Array(bytes(data.faint));
    this.root.style.height = data.height + "px";
    this.dark = isDark(this.root);
    this.fit();
    this.drawLegend();
    this.draw();
  }

  fit() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < this.xy.length; i += 2) {
      x0 = Math.min(x0, this.xy[i]); x1 = Math.max(x1, this.xy[i]);
      y0 = Math.min(y0, this.xy[i + 1]); y1 = Math.max(y1, this.xy[i + 1]);
    }
    this.box = { x: (x0 + x1) / 2, y: (y0 + y1) / 2, w: (x1 - x0) || 1, h: (y1 - y0) || 1 };
  }

  scale() {
    const w = this.root.clientWidth, h = this.data.height;
    return 0.94 * Math.min(w / this.box.w, h / this.box.h) * this.view.zoom;
  }

  screen(i) {
    const s = this.scale();
    return [
      this.root.clientWidth / 2 + (this.xy[2 * i] - this.box.x - this.view.x) * s,
      this.data.height / 2 - (this.xy[2 * i + 1] - this.box.y - this.view.y) * s,
    ];
  }

  draw() {
    const ratio = window.devicePixelRatio || 1, w = this.root.clientWidth, h = this.data.height;
    if (!w) return;
    this.canvas.width = w * ratio;
    this.canvas.height = h * ratio;
    const g = this.canvas.getContext("2d");
    g.scale(ratio, ratio);
    const n = this.colour.length, stops = this.dark ? DARK : LIGHT;
    const r = Math.max(1.4, Math.min(5, 150 / Math.sqrt(n) * Math.sqrt(this.view.zoom)));
    const grey = this.dark ? "rgb(120,125,132)" : "rgb(150,152,156)";
    for (const pass of [1, 0]) {  // the faint ones lie below
      for (let i = 0; i < n; i++) {
        if (this.faint[i] !== pass) continue;
        const [x, y] = this.screen(i);
        if (x < -9 || y < -9 || x > w + 9 || y > h + 9) continue;
        g.globalAlpha = pass ? 0.22 : 0.8;
        g.fillStyle = Number.isNaN(this.colour[i]) ? grey : ramp(stops, this.colour[i]);
        g.beginPath();
        g.arc(x, y, pass ? r * 0.8 : r, 0, 7);
        g.fill();
      }
    }
    this.drawNames(g, w, h);
    this.mark(g, this.data.chosen, 7);
    if (this.over !== undefined && this.over !== null) this.mark(g, this.over, 5.5);
  }

  drawNames(g, w, h) {
    const style = getComputedStyle(this.root);
    const text = style.getPropertyValue("--st-text-color"), back = style.getPropertyValue("--st-background-color");
    g.globalAlpha = 1;
    g.font = "600 11.5px " + (style.getPropertyValue("--st-code-font") || "monospace");
    g.textAlign = "center";
    g.lineJoin = "round";
    const taken = [];
    const s = this.scale();
    for (const name of this.data.names) {
      const x = w / 2 + (name.x - this.box.x - this.view.x) * s, y = h / 2 - (name.y - this.box.y - this.view.y) * s;
      const half = g.measureText(name.text).width / 2 + 4;
      if (x - half < 0 || x + half > w || y < 14 || y > h - 6) continue;
      if (taken.some(([a, b, c]) => Math.abs(a - x) < c + half && Math.abs(b - y) < 15)) continue;
      taken.push([x, y, half]);
      g.strokeStyle = back; g.lineWidth = 4; g.globalAlpha = 0.85;
      g.strokeText(name.text, x, y);
      g.fillStyle = text; g.globalAlpha = 1;
      g.fillText(name.text, x, y);
    }
  }

  mark(g, i, size) {
    if (i === null || i === undefined || i >= this.colour.length) return;
    const [x, y] = this.screen(i);
    g.globalAlpha = 1;
    g.lineWidth = 2;
    g.strokeStyle = getComputedStyle(this.root).getPropertyValue("--st-text-color");
    g.beginPath();
    g.arc(x, y, size, 0, 7);
    g.stroke();
  }

  drawLegend() {
    const { scale } = this.data, stops = this.dark ? DARK : LIGHT;
    this.legend.replaceChildren();
    const bar = element("i");
    bar.style.background = `linear-gradient(90deg, ${stops.map((_, k) => ramp(stops, k / (stops.length - 1))).join(",")})`;
    this.legend.append(element("b", "", scale.title), element("span", "", scale.low), bar, element("span", "", scale.high));
  }

  nearest(x, y) {
    let best = null, least = 14 * 14;
    for (let i = 0; i < this.colour.length; i++) {
      const [a, b] = this.screen(i), d = (a - x) ** 2 + (b - y) ** 2 + (this.faint[i] ? 30 : 0);
      if (d < least) { least = d; best = i; }
    }
    return best;
  }

  listen() {
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    let held = null, moved = false;
    this.canvas.onpointerdown = (event) => { held = at(event); moved = false; this.canvas.setPointerCapture(event.pointerId); };
    this.canvas.onpointerup = (event) => {
      if (held && !moved) {
        const found = this.nearest(...at(event));
        if (found !== null) this.open(found);
      }
      held = null;
    };
    this.canvas.onpointermove = (event) => {
      const [x, y] = at(event);
      if (held) {
        const [dx, dy] = [x - held[0], y - held[1]];
        if (moved || Math.abs(dx) + Math.abs(dy) > 4) {
          moved = true;
          this.view.x -= dx / this.scale();
          this.view.y += dy / this.scale();
          held = [x, y];
          this.draw();
        }
        return;
      }
      this.hover(this.nearest(x, y), event);
    };
    this.canvas.onpointerleave = () => this.hover(null);
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [x, y] = at(event), s = this.scale();
      const factor = Math.exp(-event.deltaY * 0.0015);
      const zoom = Math.max(0.5, Math.min(60, this.view.zoom * factor)), grown = zoom / this.view.zoom;
      const px = (x - this.root.clientWidth / 2) / s, py = -(y - this.data.height / 2) / s;
      this.view.x += px * (1 - 1 / grown);
      this.view.y += py * (1 - 1 / grown);
      this.view.zoom = zoom;
      this.draw();
    }, { passive: false });
    this.canvas.ondblclick = () => { this.view = { x: 0, y: 0, zoom: 1 }; this.draw(); };
  }

  hover(i, event) {
    if (i !== this.over) { this.over = i; this.draw(); }
    this.canvas.style.cursor = i === null ? "grab" : "pointer";
    if (i === null) { this.tip.style.display = "none"; return; }
    const { data } = this, list = element("dl");
    for (const [name, values] of data.notes) list.append(element("dt", "", name), element("dd", "", values[i]));
    this.tip.replaceChildren(element("div", "tiphead", "feature " + i), list);
    this.tip.style.display = "block";
    const left = Math.min(event.clientX + 14, window.innerWidth - this.tip.offsetWidth - 8);
    const below = event.clientY + 14 + this.tip.offsetHeight < window.innerHeight;
    this.tip.style.left = left + "px";
    this.tip.style.top = (below ? event.clientY + 14 : event.clientY - this.tip.offsetHeight - 10) + "px";
  }
}

export default function (component) {
  const { data, setTriggerValue } = component;
  const root = rootOf(component, "map");
  const open = (i) => setTriggerValue("open", i);
  if (root.map2d) { root.map2d.open = open; root.map2d.update(data); } else { root.map2d = new Map2d(root, data, open); }
}
