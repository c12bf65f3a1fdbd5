"""monosem: sparse-autoencoder dictionaries of language models.

The public names load on first use, so that `import sae` and `sae --help` stay quick.
"""

from __future__ import annotations

from typing import Any

_HOME = {
    "harvest": "sae.pipeline",
    "train": "sae.pipeline",
    "Live": "sae.pipeline",
    "evaluate": "sae.pipeline",
    "index": "sae.pipeline",
    "compare": "sae.pipeline",
    "controls": "sae.pipeline",
    "export": "sae.pipeline",
    "import_dictionary": "sae.pipeline",
    "load": "sae.dictionary.files",
    "SAE": "sae.dictionary.autoencoder",
    "load_model": "sae.lm",
    "steer": "sae.interventions.steering",
    "Edit": "sae.interventions.edits",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}.")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
