"""sparsify's layout: `cfg.json` and `sae.safetensors` in a directory named after the Hugging Face module it reads.

Source: EleutherAI/sparsify, `config.py` and `sparse_coder.py` (sae.py before 1.0); its package 1.0.0 and 1.3.3.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, settings
from sae.interop.hooks import hook_point
from sae.jobs.checkpoint import write_tensors
from store.common import write_json

NAME = "sparsify"
FILES = "cfg.json and sae.safetensors"

_TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_HANDLED = settings.names("""
    activation d_in k num_latents signed skip_connection transcode
""") | {assemble.OWN_CONFIG}
_HARMLESS = settings.names("""
    expansion_factor init_b_dec_as_zeros multi_topk normalize_decoder
""")  # of the training only


def detect(path: Path) -> bool:
    return (path / "cfg.json").is_file() and (path / "sae.safetensors").is_file()


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """The dictionary of one hookpoint's directory. Its hook point is the directory's name, e.g. `layers.3.mlp`.

    Raises: InteropError when it is damaged, a transcoder, of another activation than the k largest, or has settings
    that are not known here.
    """
    where = path / "cfg.json"
    original = files.read_json(where)
    config = settings.without(original, ignore)
    settings.refuse_unknown(config, _HANDLED | _HARMLESS, where)
    assemble.require(
        not config.get("transcode"), where, "it is a transcoder: it predicts activations of another hook point."
    )
    assemble.require(
        not config.get("skip_connection"), where, "it adds a linear map of its input to its output (W_skip)."
    )
    assemble.require(not config.get("signed"), where, "its features can be negative (signed); ours cannot.")
    activation = config.get("activation", "topk")
    assemble.require(activation == "topk", where, f"its activation is {activation!r}; only topk can be read.")
    tensors = assemble.take_tensors(
        files.read_safetensors(path / "sae.safetensors"), _TENSORS, path / "sae.safetensors"
    )
    assemble.transpose(tensors, ("W_enc",), where)
    shape = assemble.shape_of(tensors, where)
    assemble.require_sizes(config, {"d_in": shape["d_in"]}, where)
    if config.get("num_latents"):  # 0 means expansion_factor · d_in
        assemble.require_sizes(config, {"num_latents": shape["d_sae"]}, where)
    sae = assemble.dictionary(
        where,
        tensors,
        {"activation": "topk", "k": assemble.positive_int(config, "k", where)},
        peer=NAME,
        kind="topk",
        hook_point=hook_point(path.resolve().name),
        model=assemble.first_text(assemble.section(assemble.section(config, assemble.OWN_CONFIG), "model"), "id"),
        config=original,
    )
    return assemble.restore_own_config(sae, assemble.section(config, assemble.OWN_CONFIG))


def write(sae: SAE, out: Path) -> Path:
    """Writes the layout into `out`. Raises: InteropError unless the activation is topk, the only one in sparsify."""
    assemble.require_exportable(
        sae.activation == "topk" and sae.pre_bias and sae.d_out == sae.d_in and not sae.skip and sae.row_norm is None,
        NAME,
        f"it takes the k largest features of x − b_dec; this dictionary is {sae.show_shape()}"
        + (f" of normalised rows ({sae.row_norm})." if sae.row_norm else "."),
    )
    ours = sae.tensors()
    tensors = {theirs: ours[name].t() if name == "W_enc" else ours[name] for name, theirs in _TENSORS.items()}
    write_tensors(out / "sae.safetensors", tensors, {})
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": False,  # sparsify uses it at initialisation only
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        assemble.OWN_CONFIG: assemble.own_config(sae),
    }
    write_json(out / "cfg.json", config)
    return out
