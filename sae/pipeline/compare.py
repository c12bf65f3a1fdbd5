"""Compare two dictionaries on the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from sae.analysis import comparison
from sae.analysis.comparison import LogitWeights
from sae.analysis.parquet import write_table
from sae.dictionary.autoencoder import SAE
from sae.dictionary.trained_rows import rows_that_count
from sae.lm import LanguageModel
from sae.pipeline.errors import PipelineError
from sae.pipeline.index import spread_shards
from sae.pipeline.resolve import model_of, opened, output_hook_point, store_of
from store.activation_reader import ActivationReader
from store.common import same_model, write_json


def compare(
    a: str | Path,
    b: str | Path,
    *,
    store: str | Path | None = None,
    tokens: int = 262_144,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Compares the features of two dictionaries on A's text (held-out first); writes `A/compare/<B>/` or `out`.

    B may belong to another model with the same tokenizer: that model then runs on the same tokens, on `device`.
    A transcoder's features are compared by their activations where it reads, and by their decoder rows and logit
    weights where it writes.
    Raises: PipelineError if the two cannot read the same tokens; ValueError if there are no tokens.
    """
    a, b = Path(a), Path(b)
    (first, _), (second, _) = opened(a), opened(b)
    written = [output_hook_point(sae) for sae in (first, second)]
    acts = store_of(first, a, store)
    models = model_of(first, None, device=device), model_of(second, None, device=device)
    blocks = _paired_blocks(acts, spread_shards(acts, tokens), first, second, models)
    hooks = [sae.config["hook_point"] for sae in (first, second)]
    same_weights = models[0].weights_sha256 == models[1].weights_sha256
    found = comparison.compare(
        first,
        second,
        blocks,
        tokens=tokens,
        same_space=same_weights and hooks[0] == hooks[1],
        same_outputs=same_weights and written[0] == written[1],
        logit_weights=_logit_weights(models, written),
        seed=seed,
    )
    directory = Path(out) if out else a / "compare" / f"{b.resolve().parent.name}--{b.resolve().name}"
    result = found.summary | {
        "a": _described(first, a, models[0]),
        "b": _described(second, b, models[1]),
        "text": {"store": acts.name, "text": acts.provenance["text"], "order": "held-out contexts first"},
        "seed": seed,
    }
    for name, columns in found.tables.items():
        write_table(directory / f"{name}.parquet", columns)
    write_json(directory / "compare.json", result)
    return result | {"path": str(directory)}


def _logit_weights(models: Sequence[LanguageModel], hooks: Sequence[str]) -> tuple[LogitWeights, LogitWeights] | None:
    """Logit weights of the tokens of either model; None if one has no linear path, or embeds fewer tokens."""
    if any(model.why_no_path(hook) for model, hook in zip(models, hooks, strict=True)):
        return None
    if not torch.equal(models[0].token_ids, models[1].token_ids):
        return None

    def of(model: LanguageModel, hook: str) -> LogitWeights:
        return lambda directions: model.of_tokens(model.logit_weights(directions.to(model.device), hook))

    return of(models[0], hooks[0]), of(models[1], hooks[1])


def _described(sae: SAE, directory: Path, model: LanguageModel) -> dict[str, Any]:
    config = sae.config
    return {
        "name": f"{directory.resolve().parent.name}/{directory.resolve().name}",
        "recipe": config.get("recipe"),
        "seed": config.get("train", {}).get("seed"),
        "d_sae": sae.d_sae,
        "hook_point": config["hook_point"],
        **({"target_hook_point": output_hook_point(sae)} if sae.is_transcoder else {}),
        "model": model.identity(),
    }


def _paired_blocks(
    store: ActivationReader, shards: list[tuple[str, int]], a: SAE, b: SAE, models: tuple[LanguageModel, LanguageModel]
) -> Iterator[comparison.PairedBlock]:
    """Each shard's rows of both models: read from the store if it holds them, else computed by running the model."""
    for model in models:
        if _tokenizer_of(model) != store.provenance["tokenizer_sha256"]:
            raise PipelineError(
                f"{model.id} has another tokenizer than the text in {store.path}, so its activations belong to other "
                "tokens. Two models can be compared if they share a tokenizer."
            )
        if model.context_tokens < store.seq_len:
            raise PipelineError(
                f"{model.id} reads at most {model.context_tokens} tokens, and the contexts of {store.path} have "
                f"{store.seq_len}. Harvest a store with --seq-len {model.context_tokens}."
            )
    for split, shard in shards:
        contexts = store.read_contexts(split, shard)
        if not len(contexts.tokens):
            continue
        tokens = torch.from_numpy(contexts.tokens.astype("int64"))
        x = []
        for sae, model in zip((a, b), models, strict=True):
            hook = sae.config["hook_point"]
            held = hook in store.hook_points and same_model(store.provenance["model"], model.identity())
            x.append(
                torch.from_numpy(store.read_acts(split, shard, hook))
                if held
                else model.capture(tokens, hook).float().cpu().flatten(0, 1)
            )
        keep = torch.from_numpy(contexts.keep)
        for sae, rows in zip((a, b), x, strict=True):
            keep &= rows_that_count(sae, None, tokens, rows.view(*tokens.shape, -1))
        yield comparison.PairedBlock(x[0], x[1], keep.flatten())


def _tokenizer_of(model: LanguageModel) -> str:
    return sha256(model.tokenizer.to_str().encode()).hexdigest()
