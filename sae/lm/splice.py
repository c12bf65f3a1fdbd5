"""The model's loss at each token when the activations at a hook point are replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.lm import LanguageModel, Splice

# Logits in memory at once. Few on a CPU: malloc returns larger blocks to the system and maps them again each time.
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}


@torch.inference_mode()
def replaced_losses(
    model: LanguageModel,
    tokens: Int[Tensor, "contexts pos"],
    keep: Bool[Tensor, "contexts pos"],
    hook_point: str,
    replacements: Mapping[str, Float[Tensor, "*contexts_pos d_in"]],
    *,
    divergence_of: str | None = None,
) -> dict[str, Float[Tensor, "contexts pos"]]:
    """Next-token cross-entropy in nats: per replacement `ce_<name>` with x replaced at kept positions.

    With `divergence_of` also `ce_clean`, and `kl` = KL(clean ‖ with the replacement `divergence_of`). Values are at the
    predicting position; the last one is 0.
    """
    runs = {name: {hook_point: replacement} for name, replacement in replacements.items()}
    return jointly_replaced_losses(model, tokens, keep, runs, divergence_of=divergence_of)


@torch.inference_mode()
def jointly_replaced_losses(
    model: LanguageModel,
    tokens: Int[Tensor, "contexts pos"],
    keep: Bool[Tensor, "contexts pos"],
    runs: Mapping[str, Mapping[str, Float[Tensor, "*contexts_pos _"]]],
    *,
    divergence_of: str | None = None,
) -> dict[str, Float[Tensor, "contexts pos"]]:
    """As `replaced_losses`, with what replaces the activations at each of several hook points in one run of the model.

    `runs`: `{name: {hook point: replacement}}`; a run without a replacement is the model as it is.
    """
    room = LOGITS_AT_ONCE.get(model.device.type, LOGITS_AT_ONCE["cpu"])
    at_once = max(1, room // (tokens.shape[1] * model.d_vocab))
    names = [*(f"ce_{name}" for name in runs), *(("ce_clean", "kl") if divergence_of else ())]
    found = {name: torch.zeros(tokens.shape) for name in names}
    for start in range(0, len(tokens), at_once):
        here = slice(start, start + at_once)
        targets = tokens[here, 1:, None].long().to(model.device)

        def log_p(replacements: Mapping[str, Tensor], here: slice = here) -> Tensor:
            splices = {
                hook_point: splice(keep[here], each[here] if each.dim() == 3 else each)
                for hook_point, each in replacements.items()
            }
            return model.spliced_logits(tokens[here], splices)[:, :-1].float().log_softmax(-1)

        def record(name: str, values: Tensor, here: slice = here) -> None:
            found[name][here, :-1] = values.cpu()

        clean = log_p({}) if divergence_of else None
        if clean is not None:
            record("ce_clean", -clean.gather(-1, targets).squeeze(-1))
        for name, replacements in runs.items():
            replaced = log_p(replacements)
            record(f"ce_{name}", -replaced.gather(-1, targets).squeeze(-1))
            if clean is not None and name == divergence_of:
                record("kl", torch.linalg.vecdot(clean.exp(), clean - replaced))
    return found


def splice(keep: Bool[Tensor, "contexts pos"], replacement: Float[Tensor, "*contexts_pos d_in"]) -> Splice:
    """A splice that replaces x where tokens are kept; BOS and padding stay as they are."""
    return lambda x: torch.where(keep[..., None].to(x.device), replacement.to(x.device), x)


def splice_identity_error(
    model: LanguageModel,
    tokens: Int[Tensor, "contexts pos"],
    hook_point: str,
    x_hat: Float[Tensor, "contexts pos d_in"],
) -> float:
    """max |loss(x̂ + (x − x̂)) − loss(x)|: near zero if the splice replaces the right activations and nothing else."""
    clean = model.token_losses(tokens)
    back = model.token_losses(tokens, hook_point, lambda x: x_hat.to(x.device) + (x - x_hat.to(x.device)))
    return (clean - back).abs().max().item()
