"""The pipeline as functions: one per verb of the `sae` command, to call from scripts. The only importer of `store`."""

from sae.pipeline.comparing import compare
from sae.pipeline.controls import controls
from sae.pipeline.describing import describe
from sae.pipeline.dictionaries import feature_max, feature_units, open_rows, train
from sae.pipeline.dumps import DUMP_FORMATS, import_dump
from sae.pipeline.exchange import EXPORT_FORMATS, IMPORT_FORMATS, export, import_dictionary
from sae.pipeline.feature_text import describe_feature, feature_text
from sae.pipeline.living import Live
from sae.pipeline.measuring import evaluate, index
from sae.pipeline.pairing import PipelineError, open_pair
from sae.pipeline.stores import (
    DEFAULT_HOOK_POINT,
    Forecast,
    forecast_harvest,
    harvest,
    repair,
    source_of,
    verify,
)
from sae.pipeline.sweeping import sweep
from sae.pipeline.upkeep import clean, export_numpy, merge_stores, subset_store

__all__ = [
    "subset_store",
    "source_of",
    "repair",
    "merge_stores",
    "export_numpy",
    "clean",
    "DEFAULT_HOOK_POINT",
    "DUMP_FORMATS",
    "EXPORT_FORMATS",
    "IMPORT_FORMATS",
    "Forecast",
    "Live",
    "PipelineError",
    "compare",
    "controls",
    "describe",
    "describe_feature",
    "evaluate",
    "export",
    "feature_max",
    "feature_text",
    "feature_units",
    "forecast_harvest",
    "harvest",
    "import_dictionary",
    "import_dump",
    "index",
    "open_pair",
    "open_rows",
    "sweep",
    "train",
    "verify",
]
