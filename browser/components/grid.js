// A table of tokens: text at the left, then bars (one number a token), then cells (token × column).
// Token text goes through textContent only. A row sends "row", a column's head "column".
// data: {vocab: [[id, [[kind, text], …]], …], rows: [vocab index], selected, rtl: false,
//        bars: [{title, help, values: [number|null], max, signed}], columns: [{title, note, open}],
//        cells: [[row, column, value]], max: [number] per column, floor, unit, height}
const GLYPHS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const INVISIBLE = /[\p{Cc}\p{Cf}\u2028\u2029]/u;

function element(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
}

function glyph(shown, original) {
  const outer = element("span", "glyph");
  outer.dataset.g = shown;
  outer.append(element("span", "hidden", original));
  return outer;
}

function appendPieces(target, pieces) {
  for (const [kind, text] of pieces) {
    if (kind === "hex") { target.append(glyph("‹" + text + "›", "")); continue; }
    for (const character of text) {
      if (!INVISIBLE.test(character) && character !== " ") { target.append(character); continue; }
      const code = character.codePointAt(0).toString(16).padStart(2, "0");
      target.append(glyph(GLYPHS[character] || "‹" + code + "›", character));
    }
  }
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  return Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1);
}

function drawBar(bar, row) {
  const value = bar.values[row];
  const cell = element("span", "bar");
  if (value !== null) {
    const fill = element("i", value < 0 ? "negative" : "");
    fill.style.width = 100 * Math.min(1, Math.abs(value) / (bar.max || 1)) + "%";
    cell.append(fill);
  }
  cell.append(element("b", "", number(value)));
  return cell;
}

function drawRow(data, byRow, r) {
  const row = element("div", r === data.selected ? "row chosen" : "row");
  row.dataset.r = r;
  const text = element("span", "text");
  appendPieces(text, data.vocab[data.rows[r]][1]);
  row.append(element("span", "at", String(r)), text);
  for (const bar of data.bars) row.append(drawBar(bar, r));
  const first = 3 + data.bars.length;
  for (const [, c, value] of byRow.get(r) || []) {
    const cell = element("span", value < 0 ? "cell negative" : "cell");
    cell.style.gridColumn = String(first + c);
    const share = Math.min(1, Math.abs(value) / (data.max[c] || 1));
    cell.style.setProperty("--p", (data.floor + (1 - data.floor) * share).toFixed(3));
    cell.dataset.c = c;
    cell.dataset.v = value;
    row.append(cell);
  }
  return row;
}

function drawHead(data) {
  const head = element("div", "row heads");
  head.append(element("span", "at", ""), element("span", "text", ""));
  for (const bar of data.bars) {
    const title = element("span", "barhead", bar.title);
    title.dataset.help = bar.help || "";
    head.append(title);
  }
  data.columns.forEach((column, c) => {
    const title = element("span", column.open === null ? "colhead" : "colhead open");
    const inner = element("span", "turned");
    inner.append(element("b", "", column.title), element("span", "note", column.note));
    title.append(inner);
    title.dataset.c = c;
    head.append(title);
  });
  return head;
}

function place(tip, box) {
  tip.style.display = "block";
  const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
  tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
  tip.style.left = Math.max(4, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8)) + "px";
}

function fillTip(tip, data, target) {
  tip.replaceChildren();
  if (target.dataset.help !== undefined) {
    if (!target.dataset.help) return false;
    tip.append(element("div", "", target.dataset.help));
    return true;
  }
  if (target.dataset.c === undefined) return false;
  const column = data.columns[Number(target.dataset.c)];
  tip.append(element("div", "tiphead", column.title + (column.note ? "  " + column.note : "")));
  if (target.dataset.v === undefined) return true;
  const r = Number(target.parentElement.dataset.r);
  const text = element("div", "tiptoken");
  appendPieces(text, data.vocab[data.rows[r]][1]);
  tip.append(text, element("div", "", data.unit + " " + number(Number(target.dataset.v)) + " at position " + r));
  return true;
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  let root = parentElement.querySelector(".grid");
  if (!root) {
    root = element("div", "grid");
    root.tabIndex = 0;
    parentElement.append(root);
  }
  const scrolled = root.scrollTop, across = root.scrollLeft;
  const byRow = new Map();
  for (const cell of data.cells) {
    if (!byRow.has(cell[0])) byRow.set(cell[0], []);
    byRow.get(cell[0]).push(cell);
  }
  const drawn = document.createDocumentFragment();
  drawn.append(drawHead(data));
  data.rows.forEach((_, r) => drawn.append(drawRow(data, byRow, r)));
  const tip = element("div", "tip");
  drawn.append(tip);
  root.style.maxHeight = data.height + "px";
  root.style.setProperty("--bars", data.bars.length ? `repeat(${data.bars.length}, 74px)` : "");
  root.style.setProperty("--cells", data.columns.length ? `repeat(${data.columns.length}, 22px)` : "");
  root.replaceChildren(drawn);
  root.scrollTop = scrolled;
  root.scrollLeft = across;
  root.onclick = (event) => {
    const head = event.target.closest(".colhead");
    if (head) {
      const open = data.columns[Number(head.dataset.c)].open;
      if (open !== null) setTriggerValue("column", open);
      return;
    }
    const row = event.target.closest(".row");
    if (row && row.dataset.r !== undefined) setTriggerValue("row", Number(row.dataset.r));
  };
  root.onkeydown = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || data.selected === null) return;
    event.preventDefault();
    setTriggerValue("row", Math.max(0, Math.min(data.rows.length - 1, data.selected + step)));
  };
  root.onmouseover = (event) => {
    const target = event.target.closest(".cell, .colhead, .barhead");
    if (!target || !fillTip(tip, data, target)) { tip.style.display = "none"; return; }
    place(tip, target.getBoundingClientRect());
  };
  root.onmouseleave = () => { tip.style.display = "none"; };
}
