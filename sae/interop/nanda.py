"""Neel Nanda's one-layer dictionaries (gelu-1l and similar models): `25.pt` next to `25_cfg.json`.

Also those of others trained with that code, such as Kissane and Krzyzanowski's of attention outputs (hook_z). The code
opens models with TransformerLens' processing on.
Source: neelnanda-io/1L-Sparse-Autoencoder, `utils.py` and `train.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.interop import assemble, files, settings
from sae.interop.files import InteropError
from sae.interop.hooks import short_hook_point
from sae.interop.processed_model import fold_centring, known_layer_norm, refuse_processed

NAME = "nanda"
FILES = "N.pt and N_cfg.json"
_HANDLED = settings.names("""
    act act_name act_size activation d_mlp dict_size head layer model_name remove_rare_dir site
""")
_HARMLESS = settings.names("""
    batch_size beta1 beta2 buffer_batches buffer_device buffer_mult buffer_size checkpoint_offset concat_heads
    dataset device dict_mult enc_dtype l1_coeff load_checkpoint_idx lr lr_decay model_batch_size n_buffers name
    num_batches num_tokens resample_factor resample_scheme rows_to_ablate save_state_dict_every seed seq_len
    train_percent wandb_entity wandb_mode_online wandb_project_name
""")


def _weights(path: Path) -> list[Path]:
    """The .pt files at `path` (a file or a directory) that have a configuration next to them."""
    found = [path] if path.is_file() else sorted(path.glob("*.pt"))
    return [file for file in found if file.suffix == ".pt" and _config_of(file).is_file()]


def _config_of(weights: Path) -> Path:
    return weights.with_name(f"{weights.stem}_cfg.json")


def detect(path: Path) -> bool:
    return bool(_weights(path))


def read(path: Path, ignore: Collection[str] = ()) -> SAE:
    """One dictionary: ReLU with a tied pre-bias. Decoder norms stay as they are; in the published runs they are not 1.

    Raises: InteropError when it is damaged, has settings that are not known here, or when the directory holds several
    dictionaries.
    """
    found = _weights(path)
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        raise InteropError(f"{path} holds several dictionaries ({names}); give the path of one file.")
    weights = found[0]
    where = _config_of(weights)
    original = files.read_json(where)
    config = settings.without(original, ignore)
    settings.refuse_unknown(config, _HANDLED | _HARMLESS, where)
    assemble.require(settings.is_off(config.get("head")), where, "it reads a single attention head (head).")
    assemble.require(
        settings.is_off(config.get("remove_rare_dir")),
        where,
        "it was trained on activations without one direction, which is not in the file (remove_rare_dir).",
    )
    activation = config.get("activation", "relu")
    assemble.require(activation == "relu", weights, f"its activation is {activation!r}; only relu can be read.")
    tensors = assemble.take_tensors(
        files.read_pt(weights), {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, weights
    )
    shape = assemble.shape_of(tensors, weights)
    assemble.require_sizes(config, {"act_size": shape["d_in"], "dict_size": shape["d_sae"]}, where)
    model = assemble.first_text(config, "model_name") or "gelu-1l"
    place = short_hook_point(assemble.first_text(config, "act_name", "site", "act") or "post", config.get("layer", 0))
    processed = {name: True for name in settings.IMPLIED if name not in ignore} if known_layer_norm(model) else {}
    centred = place is not None and refuse_processed(processed, place, model, where)
    return assemble.dictionary(
        weights,
        tensors,
        {"activation": "relu", "row_norm": "mean" if centred else None},
        peer=NAME,
        kind="relu",
        hook_point=place,
        model=model,
        config=original,
        notes=[fold_centring(tensors, pre_bias=True)] if centred else [],
    )
