"""SAELens' side of scripts/check_peers.py."""

from __future__ import annotations

import json
from pathlib import Path

import sides
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

HOOK = "blocks.3.hook_resid_post"


def compute(directory: Path, x: torch.Tensor) -> sides.Computed:
    sae = SAE.load_from_disk(str(directory), device="cpu")
    expected = json.loads((directory / "cfg.json").read_text())["metadata"]["hook_name"]
    if sae.cfg.metadata.hook_name != expected:
        raise ValueError(f"hook_name was lost: {sae.cfg.metadata.hook_name} instead of {expected}")
    acts = sae.encode(x)
    return acts, sae.decode(acts)


def fill(sae: SAE, seed: int, names: dict[str, str] | None = None) -> None:
    given = sides.weights(seed, unit_norms=seed % 2 == 0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(given[(names or {}).get(name, name)])


def settings(**more: object) -> dict[str, object]:
    metadata = SAEMetadata(model_name="gpt2-small", hook_name=HOOK)
    return {"d_in": sides.D_IN, "d_sae": sides.D_SAE, "metadata": metadata, **more}


def make(name: str, sae: SAE, seed: int, names: dict[str, str] | None = None) -> None:
    fill(sae, seed, names)
    directory = sides.place(name)
    sae.save_model(directory)
    write_answers(directory, sae, seed)


def write_answers(directory: Path, sae: SAE, seed: int) -> None:
    x = sides.rows(seed, sae.b_dec.detach())
    with torch.no_grad():
        acts = sae.encode(x)
        sides.write(directory, {"x": x, "acts": acts, "x_hat": sae.decode(acts)})


def make_batch_topk(name: str, seed: int, *, rescale: bool, scale: float | None) -> None:
    """A checkpoint saved during training; the answers are those of its inference form."""
    config = BatchTopKTrainingSAEConfig(
        **settings(
            k=float(sides.K),
            rescale_acts_by_decoder_norm=rescale,
            normalize_activations="none" if scale is None else "expected_average_only_in",
        )
    )
    sae = BatchTopKTrainingSAE(config)
    fill(sae, seed)
    sae.topk_threshold.fill_(0.4)
    directory = sides.place(name)
    sae.save_model(directory)
    if scale is not None:
        (directory / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
        sae.fold_activation_norm_scaling_factor(scale)
    inference = directory.with_name(f".{name}-inference")
    sae.save_inference_model(inference)
    write_answers(directory, SAE.load_from_disk(inference, device="cpu"), seed)


def make_scaled(name: str, seed: int, scale: float) -> None:
    """Trained on scaled activations, with the scale in another file; the answers are those after SAELens' folding."""
    sae = StandardSAE(StandardSAEConfig(**settings(normalize_activations="expected_average_only_in")))
    fill(sae, seed)
    directory = sides.place(name)
    sae.save_model(directory)
    (directory / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    sae.fold_activation_norm_scaling_factor(scale)
    write_answers(directory, sae, seed)


def make_old(name: str, seed: int, **more: object) -> None:
    """As versions before 6 wrote it, with all settings at the top level; the answers are of the installed version."""
    given = sides.weights(seed, unit_norms=False)
    directory = sides.place(name)
    save_file({n: given[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, str(directory / "sae_weights.safetensors"))
    config = {
        "d_in": sides.D_IN,
        "d_sae": sides.D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_name": HOOK,
        "hook_head_index": None,
        "normalize_activations": None,
        "apply_b_dec_to_input": False,
        "finetuning_scaling_factor": False,
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "x",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        **more,
    }
    (directory / "cfg.json").write_text(json.dumps(config))
    write_answers(directory, SAE.load_from_disk(str(directory), device="cpu"), seed)


def make_centred(name: str, seed: int) -> None:
    """Of a model whose writing weights were centred: it computes on rows without their mean, which x̂ gets back."""
    metadata = SAEMetadata(
        model_name="gpt2-small", hook_name=HOOK, model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    sae = StandardSAE(StandardSAEConfig(**(settings() | {"metadata": metadata})))
    fill(sae, seed)
    directory = sides.place(name)
    sae.save_model(directory)
    x = sides.rows(seed, sae.b_dec.detach()) + 1.0
    mean = x.mean(-1, keepdim=True)
    with torch.no_grad():
        acts = sae.encode(x - mean)
        sides.write(directory, {"x": x, "acts": acts, "x_hat": sae.decode(acts) + mean})


def make_whitened(name: str, seed: int) -> None:
    """Trained on whitened activations, with the statistics in another file; the answers are those after folding."""
    sae = StandardSAE(StandardSAEConfig(**settings(normalize_activations="covariance_whitening")))
    fill(sae, seed)
    directory = sides.place(name)
    sae.save_model(directory)
    g = torch.Generator().manual_seed(seed)
    mean, matrix = torch.randn(sides.D_IN, generator=g), torch.eye(sides.D_IN) + 0.1 * torch.randn(24, 24, generator=g)
    inverse = torch.linalg.inv(matrix).contiguous()
    statistics = {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}
    save_file(statistics, str(directory / "activation_whitening.safetensors"))
    sae.fold_activation_whitening(mean, matrix, inverse)
    write_answers(directory, sae, seed)


def make_of_heads(name: str, seed: int) -> None:
    """It joins the heads of hook_z itself; our rows are joined already."""
    metadata = SAEMetadata(model_name="gpt2-small", hook_name="blocks.3.attn.hook_z")
    sae = StandardSAE(StandardSAEConfig(**(settings(reshape_activations="hook_z") | {"metadata": metadata})))
    fill(sae, seed)
    directory = sides.place(name)
    sae.save_model(directory)
    x = sides.rows(seed, sae.b_dec.detach())
    with torch.no_grad():
        acts = sae.encode(x.view(len(x), 3, 8))
        sides.write(directory, {"x": x, "acts": acts, "x_hat": sae.decode(acts).flatten(1)})


if __name__ == "__main__":
    sides.answer(compute)
    make("standard", StandardSAE(StandardSAEConfig(**settings())), 0)
    make("standard, no pre-bias", StandardSAE(StandardSAEConfig(**settings(apply_b_dec_to_input=False))), 1)
    make("topk", TopKSAE(TopKSAEConfig(**settings(k=sides.K))), 3)
    make(
        "topk, rescaled by decoder norm", TopKSAE(TopKSAEConfig(**settings(k=6, rescale_acts_by_decoder_norm=True))), 5
    )
    make("jumprelu", JumpReLUSAE(JumpReLUSAEConfig(**settings())), 7)
    make("gated", GatedSAE(GatedSAEConfig(**settings())), 9, {"b_gate": "b_enc"})
    make_batch_topk("batchtopk checkpoint", 10, rescale=False, scale=None)
    make_batch_topk("batchtopk checkpoint, rescaled, scaled", 11, rescale=True, scale=0.7)
    make_scaled("standard, input scale", 12, 0.3)
    make_old("standard before 6.0", 13)
    make_old("topk before 6.0", 15, activation_fn_str="topk", activation_fn_kwargs={"k": sides.K})
    for number, normalize in enumerate(("layer_norm", "constant_norm_rescale")):
        told = settings(normalize_activations=normalize)
        make(f"standard, {normalize}", StandardSAE(StandardSAEConfig(**told)), 16 + number)
        make(f"topk, {normalize}", TopKSAE(TopKSAEConfig(**told, k=6)), 18 + number)
    make_centred("standard, centred writing weights", 20)
    make_whitened("standard, whitened", 21)
    make_of_heads("standard, heads of hook_z", 22)
    sides.report("sae-lens")
