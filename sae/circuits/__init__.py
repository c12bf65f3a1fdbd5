"""How a model computes: lenses, patching and circuits, with features as parts beside heads and neurons."""
