// Hands the ablation effects of a page's examples to the component that draws them (tokens.js).
// data: {key, scale, vocab: [[id, pieces]], examples: {"g,e": {i: [...], d, p, q, up, down}}}
export default function (component) {
  window.__monosem_effects = component.data;
  window.dispatchEvent(new CustomEvent("monosem-effects"));
}
