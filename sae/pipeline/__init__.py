"""The pipeline as functions: one per verb of the `sae` command, to call from scripts. The only importer of `store`.

Each function loads on first use, with the rooms that it needs and no others: describing a store does not import torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _PUBLIC, for type checkers and editors
    from sae.pipeline.compare import compare as compare
    from sae.pipeline.controls import controls as controls
    from sae.pipeline.crosscoders import crosscoder_control as crosscoder_control
    from sae.pipeline.dashboards import DUMP_FORMATS as DUMP_FORMATS
    from sae.pipeline.dashboards import import_dump as import_dump
    from sae.pipeline.errors import PipelineError as PipelineError
    from sae.pipeline.evaluate import evaluate as evaluate
    from sae.pipeline.exchange import EXPORT_FORMATS as EXPORT_FORMATS
    from sae.pipeline.exchange import IMPORT_FORMATS as IMPORT_FORMATS
    from sae.pipeline.exchange import export as export
    from sae.pipeline.exchange import import_dictionary as import_dictionary
    from sae.pipeline.harvest import DEFAULT_HOOK_POINT as DEFAULT_HOOK_POINT
    from sae.pipeline.harvest import Forecast as Forecast
    from sae.pipeline.harvest import forecast_harvest as forecast_harvest
    from sae.pipeline.harvest import harvest as harvest
    from sae.pipeline.harvest import source_of as source_of
    from sae.pipeline.index import index as index
    from sae.pipeline.info import describe as describe
    from sae.pipeline.info import describe_feature as describe_feature
    from sae.pipeline.info import machine_facts as machine_facts
    from sae.pipeline.lenses import lens as lens
    from sae.pipeline.live import Live as Live
    from sae.pipeline.own_activations import store_activations as store_activations
    from sae.pipeline.pages import PAGE_FORMATS as PAGE_FORMATS
    from sae.pipeline.pages import export_pages as export_pages
    from sae.pipeline.pretrain import pretrain as pretrain
    from sae.pipeline.repair import repair as repair
    from sae.pipeline.resolve import open_pair as open_pair
    from sae.pipeline.rows import open_rows as open_rows
    from sae.pipeline.search import search as search
    from sae.pipeline.sites import Sites as Sites
    from sae.pipeline.steer import erasure as erasure
    from sae.pipeline.steer import feature_max as feature_max
    from sae.pipeline.steer import feature_units as feature_units
    from sae.pipeline.stores import clean as clean
    from sae.pipeline.stores import export_numpy as export_numpy
    from sae.pipeline.stores import merge_stores as merge_stores
    from sae.pipeline.stores import subset_store as subset_store
    from sae.pipeline.stores import verify as verify
    from sae.pipeline.sweep import sweep as sweep
    from sae.pipeline.train import train as train

_PUBLIC = {  # by module
    "compare": ("compare",),
    "controls": ("controls",),
    "crosscoders": ("crosscoder_control",),
    "dashboards": ("DUMP_FORMATS", "import_dump"),
    "errors": ("PipelineError",),
    "evaluate": ("evaluate",),
    "exchange": ("EXPORT_FORMATS", "IMPORT_FORMATS", "export", "import_dictionary"),
    "harvest": ("DEFAULT_HOOK_POINT", "Forecast", "forecast_harvest", "harvest", "source_of"),
    "index": ("index",),
    "info": ("describe", "describe_feature", "machine_facts"),
    "lenses": ("lens",),
    "live": ("Live",),
    "own_activations": ("store_activations",),
    "pages": ("PAGE_FORMATS", "export_pages"),
    "pretrain": ("pretrain",),
    "repair": ("repair",),
    "resolve": ("open_pair",),
    "rows": ("open_rows",),
    "search": ("search",),
    "sites": ("Sites",),
    "steer": ("erasure", "feature_max", "feature_units"),
    "stores": ("clean", "export_numpy", "merge_stores", "subset_store", "verify"),
    "sweep": ("sweep",),
    "train": ("train",),
}
_HOME = {name: f"sae.pipeline.{module}" for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae.pipeline' has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(import_module(_HOME[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return __all__


class _Pipeline(ModuleType):
    """A package in which a function keeps its name although its module has the same one.

    Importing `sae.pipeline.train` would set the package's attribute `train` to that module and hide the function.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Pipeline
