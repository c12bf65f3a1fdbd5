// Draws groups of examples, each a line of tokens coloured by activation, and one shared tooltip.
// Token text goes through textContent only; an element's textContent equals its token exactly.
// data: {key, max, bos, vocab: [[id, [[kind, text], …]], …],
//        groups: [{title, note, empty, examples: [{v: [vocab index], a: [activation], start, hit,
//                  value, where, doc, context, row, plain, dim, first, picture, grid, leading}]}],
//        pictures: [data URL]}
function drawExample(data, example, e, g, drawn) {
  const line = element("div", example.plain ? "example plain" : "example");
  if (!example.plain) line.append(element("span", "value", number(example.value)));
  const text = element("span", "text");
  text.dir = "auto";
  example.v.forEach((entry, i) => {
    const token = element("span", "tok");
    token.dataset.at = g + "," + e + "," + i;
    drawn.set(token.dataset.at, token);
    const act = example.a ? example.a[i] : 0;
    if (act > 0) {
      token.classList.add("on");
      // a firing stays visible even when it is faint
      token.style.setProperty("--p", (0.1 + 0.9 * Math.min(1, act / data.max)).toFixed(3));
    }
    if (i === example.hit) token.classList.add("hit");
    if (data.vocab[entry][0] === data.bos) token.classList.add("bos");
    if (i < example.dim) token.classList.add("dim");
    if (example.first !== null && example.first !== undefined && i >= example.first) {
      token.classList.add(i === example.first ? "first" : "changed");
    }
    appendPieces(token, data.vocab[entry][1]);
    text.append(token);
  });
  line.append(text);
  if (!example.plain) line.append(element("span", "where", example.where));
  return line;
}

// An image with its patches as cells of a square grid, coloured by activation; other rows of the sample come below it.
function drawPicture(data, example, e, g, drawn) {
  const figure = element("figure", "picture");
  const frame = element("div", "frame");
  const image = element("img");
  image.src = data.pictures[example.picture];
  image.alt = "";
  frame.append(image);
  const grid = element("div", "grid"), others = element("div", "others");
  grid.style.gridTemplateColumns = `repeat(${example.grid || 1}, 1fr)`;
  example.v.forEach((_, i) => {
    const position = example.start + i;
    const cell = element("span", i === example.hit ? "tok cell hit" : "tok cell");
    cell.dataset.at = g + "," + e + "," + i;
    drawn.set(cell.dataset.at, cell);
    const act = example.a[i];
    if (act > 0) cell.style.setProperty("--p", (0.15 + 0.85 * Math.min(1, act / data.max)).toFixed(3));
    (example.grid && position >= example.leading ? grid : others).append(cell);
  });
  frame.append(grid);
  figure.append(frame, others);
  const caption = element("figcaption", "value", number(example.value));
  caption.append(element("span", "where", example.row.replace(/^.*(?=\[)/, "")));
  figure.append(caption);
  return figure;
}

// Underlines what ablation changes, once effects.js has brought it for these very examples.
function applyEffects(root, data, tokens) {
  root.removeAttribute("data-underlined");
  const effects = window.__monosem_effects;
  root.effects = effects && data.key && effects.key === data.key ? effects : null;
  if (!root.effects) return;
  root.dataset.underlined = data.key;
  for (const [place, found] of Object.entries(effects.examples)) {
    found.i.forEach((i, n) => {
      const token = tokens.get(place + "," + i);
      const size = Math.abs(found.d[n]) / effects.scale;
      if (!token || size < 0.04) return;
      token.classList.add(found.d[n] > 0 ? "helped" : "hurt");
      token.style.setProperty("--d", Math.min(1, 0.25 + 0.75 * size).toFixed(3));
    });
  }
}

function effectLines(tip, effects, g, e, i) {
  const found = effects && effects.examples[g + "," + e];
  const n = found ? found.i.indexOf(i) : -1;
  if (n < 0) return;
  const list = element("dl", "effect");
  const add = (name, ...nodes) => {
    const value = element("dd");
    value.append(...nodes);
    list.append(element("dt", "", name), value);
  };
  const sign = found.d[n] > 0 ? "+" : "−";
  add("Δloss", sign + number(Math.abs(found.d[n])) + " nats " +
    (found.d[n] > 0 ? "(the feature helps)" : "(the feature hurts)"));
  if (found.p[n] !== null) add("p(token)", number(found.p[n]) + " → " + number(found.q[n]) + " without");
  for (const [name, side] of [["raises", found.up[n]], ["lowers", found.down[n]]]) {
    const shown = side.flatMap(([entry, change]) => {
      const token = element("bdi", "moved");
      appendPieces(token, effects.vocab[entry][1], true);
      return [token, " " + (change > 0 ? "+" : "−") + number(Math.abs(change)) + "  "];
    });
    if (shown.length) add(name, ...shown);
  }
  tip.append(list);
}

function fillTip(tip, data, at, effects) {
  const [g, e, i] = at.split(",").map(Number);
  const example = data.groups[g].examples[e];
  const [id, pieces] = data.vocab[example.v[i]];
  const token = element("div", "tiptoken");
  appendPieces(token, pieces, true);
  const list = element("dl");
  const add = (name, value) => {
    if (value === undefined || value === null || value === "") return;
    list.append(element("dt", "", name), element("dd", "", String(value)));
  };
  if (example.row) add("row", example.row);
  else add("token id", id);
  add("position", example.start + i);
  if (example.a) add("activation", number(example.a[i]) +
    (example.a[i] > 0 ? "  (" + Math.round((100 * example.a[i]) / data.max) + " % of max)" : ""));
  add("context", example.context);
  add("document", example.doc);
  add("domain", example.where);
  tip.replaceChildren(token, list);
  effectLines(tip, effects, g, e, i);
}

export default function (component) {
  const { data } = component;
  const root = rootOf(component, "groups");
  const tip = element("div", "tip");
  const drawn = document.createDocumentFragment();
  const tokens = new Map();
  data.groups.forEach((group, g) => {
    const section = element("section", "group");
    const head = element("div", "head");
    head.append(element("span", "title", group.title), element("span", "note", group.note));
    section.append(head);
    if (!group.examples.length) section.append(element("div", "none", group.empty));
    const pictures = element("div", "pictures");
    group.examples.forEach((example, e) => {
      if (example.picture === undefined) section.append(drawExample(data, example, e, g, tokens));
      else pictures.append(drawPicture(data, example, e, g, tokens));
    });
    if (pictures.childNodes.length) section.append(pictures);
    drawn.append(section);
  });
  drawn.append(tip);
  root.replaceChildren(drawn);
  root.dataset.key = data.key || ""; // which examples are drawn
  applyEffects(root, data, tokens);
  if (root.listener) window.removeEventListener("monosem-effects", root.listener);
  root.listener = () => applyEffects(root, data, tokens);
  window.addEventListener("monosem-effects", root.listener);
  root.onmouseover = (event) => {
    const token = event.target.closest(".tok");
    if (!token) { tip.style.display = "none"; return; }
    fillTip(tip, data, token.dataset.at, root.effects);
    placeTip(tip, token.getClientRects()[0] || token.getBoundingClientRect());
  };
  root.onmouseleave = () => { tip.style.display = "none"; };
  return () => window.removeEventListener("monosem-effects", root.listener);
}
