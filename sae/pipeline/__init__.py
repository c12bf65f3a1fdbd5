"""The pipeline as functions: one per verb of the `sae` command, to call from scripts. The only importer of `store`."""

from sae.pipeline.compare import compare
from sae.pipeline.controls import controls
from sae.pipeline.dashboards import DUMP_FORMATS, import_dump
from sae.pipeline.evaluate import evaluate
from sae.pipeline.exchange import EXPORT_FORMATS, IMPORT_FORMATS, export, import_dictionary
from sae.pipeline.feature_text import describe_feature, feature_text
from sae.pipeline.harvest import DEFAULT_HOOK_POINT, Forecast, forecast_harvest, harvest, source_of
from sae.pipeline.index import index
from sae.pipeline.info import describe
from sae.pipeline.live import Live
from sae.pipeline.resolve import PipelineError, open_pair
from sae.pipeline.rows import open_rows
from sae.pipeline.steer import feature_max, feature_units
from sae.pipeline.stores import clean, export_numpy, merge_stores, repair, subset_store, verify
from sae.pipeline.sweep import sweep
from sae.pipeline.train import train

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
