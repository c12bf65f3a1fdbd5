// Draws short lists of label, bar and number; a row that opens a feature triggers "open", its + "add".
// data: {two, lists: [{title, help, colour, empty,
//                      rows: [{prefix, label, value, extra, share, negative, open, add}]}]}
function drawRow(row, colour, setTriggerValue) {
  const line = element("div", row.open === null ? "row" : "row open");
  const bar = element("div", "bar " + (row.negative ? "negative" : colour || ""));
  bar.style.width = 100 * Math.max(0, Math.min(1, row.share)) + "%";
  const value = element("span", "value", row.value);
  if (row.extra) value.append(element("span", "extra", row.extra));
  line.append(bar);
  if (row.prefix) line.append(element("span", "prefix", row.prefix));
  line.append(element("span", "label", row.label), value);
  if (row.open !== null) line.onclick = () => setTriggerValue("open", row.open);
  if (row.add) {
    const add = element("button", "add", "+");
    add.title = "Add to the steering set";
    add.onclick = (event) => {
      event.stopPropagation();
      add.textContent = "✓";
      setTriggerValue("add", row.open);
    };
    line.append(add);
  }
  return line;
}

export default function (component) {
  const { data, setTriggerValue } = component;
  const root = rootOf(component, "lists");
  root.classList.toggle("two", data.two);
  const tip = element("div", "tip");
  const drawn = document.createDocumentFragment();
  for (const list of data.lists) {
    const section = element("section", "list");
    const head = element("div", "head");
    head.append(element("span", "", list.title));
    if (list.help) head.append(helpMark(list.help, tip));
    section.append(head);
    if (!list.rows.length) section.append(element("div", "row", list.empty));
    for (const row of list.rows) section.append(drawRow(row, list.colour, setTriggerValue));
    drawn.append(section);
  }
  drawn.append(tip);
  root.replaceChildren(drawn);
}
