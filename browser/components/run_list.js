// Draws the runs as a table whose first column links to each; a click on a column's head sorts.
// data: {in_place, columns: [{title, help, number}],
//        rows: [{id, href, cells: [{text, sort, share, tone, help}]}]}
// With in_place, a plain click triggers "open" and the page need not be loaded again.
function drawCell(cell, column) {
  const node = element("td", column.number ? "number" : "");
  if (cell.help) node.title = cell.help;
  if (cell.tone) {
    const badge = element("span", "badge", cell.text);
    badge.style.setProperty("--tone", cell.tone);
    node.append(badge);
    return node;
  }
  if (cell.share !== null) {
    const bar = element("span", "bar");
    const filled = element("i");
    filled.style.width = 100 * Math.max(0, Math.min(1, cell.share)) + "%";
    bar.append(filled);
    node.append(bar);
  }
  node.append(cell.text);
  return node;
}

function drawRow(row, data, setTriggerValue) {
  const line = element("tr");
  row.cells.forEach((cell, i) => {
    if (i) { line.append(drawCell(cell, data.columns[i])); return; }
    const link = element("a", "", cell.text);
    link.href = row.href;
    link.onclick = (event) => {
      if (!data.in_place || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      setTriggerValue("open", row.id);
    };
    const first = element("td");
    first.append(link);
    line.append(first);
  });
  return line;
}

// Empty cells come last in either direction.
function compare(a, b, column, direction) {
  const [x, y] = [a.cells[column].sort, b.cells[column].sort];
  if (x === null || y === null) return (x === null) - (y === null);
  return direction * (x < y ? -1 : x > y ? 1 : 0);
}

export default function (component) {
  const { data, setTriggerValue } = component;
  const root = rootOf(component, "runs");
  const table = element("table"), head = element("tr"), body = element("tbody");
  const top = element("thead");
  let sorted = null, direction = 1;
  const draw = () => {
    const rows = sorted === null ? data.rows : [...data.rows].sort((a, b) => compare(a, b, sorted, direction));
    body.replaceChildren(...rows.map((row) => drawRow(row, data, setTriggerValue)));
  };
  data.columns.forEach((column, i) => {
    const cell = element("th", column.number ? "number" : "");
    cell.append(element("span", "", column.title));
    cell.scope = "col";
    if (column.help) cell.title = column.help;
    cell.onclick = () => {
      direction = sorted === i ? -direction : 1;
      sorted = i;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.ariaSort = direction > 0 ? "ascending" : "descending";
      draw();
    };
    head.append(cell);
  });
  draw();
  top.append(head);
  table.append(top, body);
  root.replaceChildren(table);
}
