// A table of tokens: text at the left, then bars (one number a token), then cells (token × column).
// A click on a row triggers "row", one on a column's head "column".
// data: {vocab: [[id, [[kind, text], …]], …], rows: [vocab index], selected,
//        bars: [{title, help, values: [number|null], max}], columns: [{title, note, open}],
//        cells: [[row, column, value]], max: [number] per column, floor, unit, height,
//        tokens: whether the rows are the tokens of a text}
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
  appendPieces(text, data.vocab[data.rows[r]][1], true);
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
  appendPieces(text, data.vocab[data.rows[r]][1], true);
  const place = data.tokens ? " at position " + r : "";
  tip.append(text, element("div", "", data.unit + " " + number(Number(target.dataset.v)) + place));
  return true;
}

export default function (component) {
  const { data, setTriggerValue } = component;
  const root = rootOf(component, "grid");
  root.tabIndex = 0;
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
    placeTip(tip, target.getBoundingClientRect());
  };
  root.onmouseleave = () => { tip.style.display = "none"; };
}
