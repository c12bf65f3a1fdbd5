"""monosem: sparse-autoencoder dictionaries of language models.

The public names load on first use, so that `import sae` and `sae --help` stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for type checkers and editors
    from sae.dictionary.autoencoder import SAE as SAE
    from sae.dictionary.files import load as load
    from sae.interventions.edits import Edit as Edit
    from sae.interventions.steering import steer as steer
    from sae.lm.load import load_model as load_model
    from sae.pipeline.compare import compare as compare
    from sae.pipeline.controls import controls as controls
    from sae.pipeline.evaluate import evaluate as evaluate
    from sae.pipeline.exchange import export as export
    from sae.pipeline.exchange import import_dictionary as import_dictionary
    from sae.pipeline.harvest import harvest as harvest
    from sae.pipeline.index import index as index
    from sae.pipeline.live import Live as Live
    from sae.pipeline.own_activations import store_activations as store_activations
    from sae.pipeline.search import search as search
    from sae.pipeline.train import train as train

_HOME = {
    "SAE": "sae.dictionary.autoencoder",
    "load": "sae.dictionary.files",
    "Edit": "sae.interventions.edits",
    "steer": "sae.interventions.steering",
    "load_model": "sae.lm.load",
    "compare": "sae.pipeline.compare",
    "controls": "sae.pipeline.controls",
    "evaluate": "sae.pipeline.evaluate",
    "export": "sae.pipeline.exchange",
    "import_dictionary": "sae.pipeline.exchange",
    "harvest": "sae.pipeline.harvest",
    "index": "sae.pipeline.index",
    "Live": "sae.pipeline.live",
    "search": "sae.pipeline.search",
    "store_activations": "sae.pipeline.own_activations",
    "train": "sae.pipeline.train",
}

__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
