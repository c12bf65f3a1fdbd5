// Keys that no button has: "/" goes to the page's search box, "?" shows the keys, Escape leaves either.
// data: {keys: [[key, what it does]]}
function typing(event) {
  const at = event.composedPath()[0];
  return at instanceof HTMLElement && (at.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName));
}

// The page's own search box if it has one, else the feature number.
function search() {
  const boxes = ["Search", "Token", "Find", "Feature"].map((name) =>
    [...document.querySelectorAll("input[aria-label]")].find((box) => box.ariaLabel === name && box.offsetParent));
  return boxes.find(Boolean);
}

export default function (component) {
  const { data, parentElement } = component;
  let help = parentElement.querySelector(".keys");
  if (!help) {
    help = element("dialog", "keys");
    help.setAttribute("aria-label", "Keys");
    parentElement.append(help);
  }
  const list = element("dl");
  for (const [key, what] of data.keys) {
    const name = element("dt");
    for (const each of key.split(" ")) name.append(element("kbd", "", each));
    list.append(name, element("dd", "", what));
  }
  help.replaceChildren(element("div", "title", "Keys"), list);
  help.onclick = () => help.close();
  const pressed = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing(event)) { event.composedPath()[0].blur(); return; }
    if (typing(event)) return;
    if (event.key === "?") {
      event.preventDefault();
      if (help.open) help.close(); else help.showModal();
    } else if (event.key === "/") {
      const box = search();
      if (!box) return;
      event.preventDefault();
      help.close();
      box.focus();
      box.select();
    }
  };
  if (help.listener) document.removeEventListener("keydown", help.listener);
  help.listener = pressed;
  document.addEventListener("keydown", pressed);
  return () => document.removeEventListener("keydown", pressed);
}
