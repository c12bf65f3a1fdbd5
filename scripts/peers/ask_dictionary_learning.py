"""dictionary_learning's side of scripts/check_peers.py."""

from __future__ import annotations

import json
from pathlib import Path

import sides
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary

OURS = {  # its parameters → the weights of `sides`
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
}


def compute(directory: Path, x: torch.Tensor) -> sides.Computed:
    dictionary, _ = load_dictionary(str(directory), device="cpu")
    acts = dictionary.encode(x)
    return acts, dictionary.decode(acts)


def make(name: str, dictionary: torch.nn.Module, seed: int, *, unit_norms: bool = True) -> None:
    """Saves as its training does: a state dict, and a configuration with a trainer."""
    given = sides.weights(seed, unit_norms=unit_norms)
    with torch.no_grad():
        for theirs, parameter in dictionary.named_parameters():
            value = given[OURS.get(theirs, theirs)]
            parameter.copy_(value.T if theirs in ("encoder.weight", "decoder.weight") else value)
    if hasattr(dictionary, "k") and not isinstance(dictionary, AutoEncoderTopK):
        dictionary.threshold.fill_(0.4)
    directory = sides.place(name)
    torch.save(dictionary.state_dict(), directory / "ae.pt")
    trainer = {
        "dict_class": type(dictionary).__name__,
        "trainer_class": "any",
        "activation_dim": sides.D_IN,
        "dict_size": sides.D_SAE,
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "submodule_name": "resid_post_layer_3",
        **({"k": sides.K} if hasattr(dictionary, "k") else {}),
    }
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    x = sides.rows(seed, given["b_dec"])
    with torch.no_grad():
        acts = dictionary.encode(x)
        sides.write(directory, {"x": x, "acts": acts, "x_hat": dictionary.decode(acts)})


if __name__ == "__main__":
    sides.answer(compute)
    size = (sides.D_IN, sides.D_SAE)
    make("AutoEncoder", AutoEncoder(*size), 0)
    make("AutoEncoder, free norms", AutoEncoder(*size), 1, unit_norms=False)
    make("AutoEncoderNew", AutoEncoderNew(*size), 2, unit_norms=False)
    make("AutoEncoderTopK", AutoEncoderTopK(*size, sides.K), 3)
    make("BatchTopKSAE", BatchTopKSAE(*size, sides.K), 4)
    make("MatryoshkaBatchTopKSAE", MatryoshkaBatchTopKSAE(*size, sides.K, [32, 64]), 5)
    make("JumpReluAutoEncoder", JumpReluAutoEncoder(*size), 6, unit_norms=False)
    make("GatedAutoEncoder", GatedAutoEncoder(*size), 7)
    sides.report("dictionary-learning")
