"""Language models: one interface over the fast native transformer and TransformerLens' bridge."""

from sae.lm.base import LanguageModel, ModelError, Splice, layer_of
from sae.lm.bridge import BridgeModel
from sae.lm.load import load_model, shipped_models
from sae.lm.native import NativeModel
from sae.lm.paths import DirectPath, NoLinearPath, Readout

__all__ = [
    "BridgeModel",
    "DirectPath",
    "LanguageModel",
    "ModelError",
    "NativeModel",
    "NoLinearPath",
    "Readout",
    "Splice",
    "layer_of",
    "load_model",
    "shipped_models",
]
