// What the components share; base.py puts it before each of them.
// Token text goes through textContent only, so it is never markup.
const GLYPHS = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
const INVISIBLE = /[\p{Cc}\p{Cf}\u2028\u2029]/u;

function element(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined && text !== null) node.textContent = text;
  return node;
}

// The one node that a component draws into; it stays the same from run to run.
function rootOf(component, name) {
  let root = component.parentElement.querySelector("." + name);
  if (!root) {
    root = element("div", name);
    component.parentElement.append(root);
  }
  return root;
}

// A visible sign in the place of a character that cannot be seen; what is copied is the character itself.
function glyph(shown, original) {
  const outer = element("span", "glyph");
  outer.dataset.g = shown;
  outer.append(element("span", "hidden", original));
  return outer;
}

// pieces: [["text" or "hex", text], …]; with `spaces`, spaces get a visible sign too.
function appendPieces(target, pieces, spaces) {
  for (const [kind, text] of pieces) {
    if (kind === "hex") { target.append(glyph("‹" + text + "›", "")); continue; }
    let plain = "";
    for (const character of text) {
      if (!INVISIBLE.test(character) && !(spaces && character === " ")) { plain += character; continue; }
      if (plain) target.append(plain);
      plain = "";
      const code = character.codePointAt(0).toString(16).padStart(2, "0");
      target.append(glyph(GLYPHS[character] || "‹" + code + "›", character));
    }
    if (plain) target.append(plain);
  }
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  return Math.abs(value) >= 0.001 ? value.toPrecision(3) : value.toExponential(1);
}

// Shows a tip below `box`, or above it where there is no room.
function placeTip(tip, box) {
  tip.style.display = "block";
  const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight;
  tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
  tip.style.left = Math.max(4, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8)) + "px";
}

// A question mark that shows `text` in the tip while the pointer is on it.
function helpMark(text, tip) {
  const mark = element("span", "help", "?");
  mark.onmouseenter = () => {
    tip.textContent = text;
    placeTip(tip, mark.getBoundingClientRect());
  };
  mark.onmouseleave = () => { tip.style.display = "none"; };
  return mark;
}
