"""Measure a dictionary and its controls by the same code on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.analysis import baselines
from sae.analysis.absorption import Tokens, absorption, kinds_of_token
from sae.analysis.probing import Labelled, probe
from sae.analysis.recorder import Recorder
from sae.dictionary.autoencoder import SAE
from sae.dictionary.inference import FrozenSAE
from sae.evaluation import evaluate as evaluation
from sae.lm import LanguageModel
from sae.lm.units import units_to_match
from sae.pipeline.donors import donors
from sae.pipeline.evaluate import eval_blocks, thinned
from sae.pipeline.resolve import autoencoder, model_of, store_of
from sae.text.tokenizer import token_bytes
from sae.training import loop
from sae.training.config import TrainConfig, with_overrides
from store.activation_reader import ActivationReader
from store.common import HELD_OUT, TRAIN, write_json

CONTROLS_FORMAT = 2  # 2: on contexts spread over the store
BASIS_ROWS = 65_536
METRICS = ("l0", "fvu", "delta_ce", "ce_loss_score_zero", "dead_share")


def controls(
    sae: str | Path,
    *,
    store: str | Path | None = None,
    model: LanguageModel | str | None = None,
    tokens: int = 65_536,
    train_tokens: int = 1_000_000,
    only: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures a dictionary and its controls (`sae.analysis.baselines`) on held-out tokens; writes controls.json.

    Features for domains and probes are chosen on the same number of training tokens. The control `shuffled_model` is a
    dictionary trained by the same recipe on `train_tokens` rows of a model with shuffled weights, and kept in
    `controls/`: repeat the call to continue after an interruption. `report` is called with a forecast, a line of text.
    Raises: PipelineError if the store or the model is not the dictionary's; ValueError for an unknown control.
    """
    dictionary, directory = autoencoder(sae), Path(sae)
    wanted = list(only) if only is not None else list(baselines.MEANING)
    if unknown := [name for name in wanted if name not in baselines.MEANING]:
        raise ValueError(f"controls: unknown control {unknown[0]!r}; choose from {', '.join(baselines.MEANING)}.")
    acts = store_of(dictionary, directory, store)
    lm = model_of(dictionary, model, device=device)
    setup = Setup(acts, lm, dictionary.config["hook_point"], tokens, device)
    report(forecast(setup, dictionary, wanted, train_tokens))
    measured = {"dictionary": setup.measure(dictionary, learned=True)}
    k = units_to_match(measured["dictionary"]["l0"] or 1, dictionary.d_sae)
    rows = setup.training_rows(BASIS_ROWS)
    untrained = baselines.made_without_training(rows, dictionary.d_sae, k, seed, only=wanted)
    measured |= {name: setup.measure(control) for name, control in untrained.items()}
    skipped = {}
    if "shuffled_model" in wanted:
        out = directory / "controls" / "shuffled_model"
        try:
            measured["shuffled_model"] = _measure_shuffled_model(setup, dictionary, out, tokens, train_tokens, seed)
        except NoRecipe as error:
            skipped["shuffled_model"] = f"left out, because {error}"
    result = {
        "format": CONTROLS_FORMAT,
        "tokens": setup.kept_tokens,
        "train_tokens": train_tokens,
        "k": k,
        "seed": seed,
        "measured": measured,
        "meaning": {name: meaning for name, meaning in baselines.MEANING.items() if name in measured},
        "skipped": skipped,
    }
    write_json(directory / "controls.json", result)
    return result


class NoRecipe(ValueError):
    """The dictionary's recipe cannot be repeated on the shuffled model; the message says why."""


def _measure_shuffled_model(
    setup: Setup, sae: SAE, out: Path, tokens: int, train_tokens: int, seed: int
) -> dict[str, Any]:
    """Trains a dictionary like `sae` on the model with shuffled weights, and measures it there."""
    with baselines.shuffled_weights(setup.model, seed) as shuffled:
        there = Setup(setup.store, shuffled, setup.hook_point, tokens, setup.device, live=True)
        return there.measure(_trained_on(there, sae, out, train_tokens), learned=True)


def forecast(setup: Setup, sae: SAE, wanted: Sequence[str], train_tokens: int) -> str:
    """How much work it will be, as a line of text."""
    rows = min(train_tokens, setup.trainable_rows) if "shuffled_model" in wanted else 0
    gigabytes = (rows * sae.d_in * 4 + BASIS_ROWS * sae.d_in * 12) / 1e9
    return (
        f"forecast: {len(wanted) + 1} dictionaries evaluated on {setup.kept_tokens:,} tokens each, "
        f"{train_tokens if rows else 0:,} rows of training, about {gigabytes:.1f} GB of memory"
    )


class Setup:
    """The text and the model on which everything is measured; `live` runs the model instead of reading activations."""

    def __init__(
        self,
        store: ActivationReader,
        model: LanguageModel,
        hook_point: str,
        tokens: int,
        device: str = "auto",
        *,
        live: bool = False,
    ) -> None:
        self.store, self.model, self.hook_point, self.device, self.live = store, model, hook_point, device, live
        self.chosen = {split: thinned(store, split, tokens) for split in (HELD_OUT, TRAIN)}
        shards, every = self.chosen[HELD_OUT]
        documents, numbers, self.kept_tokens = store.documents(HELD_OUT), set[int](), 0
        for contexts in (store.read_contexts(HELD_OUT, shard) for shard in shards):
            keep = contexts.keep[::every]
            numbers.update(np.unique(contexts.document[::every][keep]).tolist())
            self.kept_tokens += int(keep.sum())
        self.domains = sorted({documents[number][2] for number in numbers})
        self.ablated: evaluation.Ablated = {}  # what depends on no dictionary, measured once
        self.trainable_rows = sum(marker.kept_rows for marker in store.markers(TRAIN).values())

    def blocks(self, split: str, shards: list[int] | None = None) -> Iterator[evaluation.Block]:
        """The chosen contexts of a split, or all those of some shards."""
        shards, every = self.chosen[split] if shards is None else (shards, 1)
        for block in eval_blocks(self.store, self.hook_point, self.domains, split, shards, every=every):
            if self.live:
                acts = self.model.capture(block.tokens, self.hook_point).float().cpu()
                block = block._replace(acts=acts)
            yield block

    def training_rows(self, n: int) -> torch.Tensor:
        """The first n kept training rows (documents are stored in a random order)."""
        rows, filled = torch.empty(min(n, self.trainable_rows), self.store.hook_points[self.hook_point]), 0
        for block in self.blocks(TRAIN, sorted(self.store.markers(TRAIN))):
            kept = block.acts[block.keep][: len(rows) - filled]
            rows[filled : filled + len(kept)] = kept
            filled += len(kept)
            if filled == len(rows):
                break
        return rows[:filled]

    def measure(self, sae: SAE, *, learned: bool = False) -> dict[str, Any]:
        """One row of the table; absorption is measured for `learned` dictionaries only."""
        mean = torch.stack([block.acts[block.keep].double().sum(0) for block in self.blocks(HELD_OUT)]).sum(0)
        resampled = self.training_rows(4096) if self.live else donors(self.store, self.hook_point)
        found, _ = evaluation.evaluate(
            sae,
            self.model,
            evaluation.Blocks(lambda: self.blocks(HELD_OUT)),
            training=self.blocks(TRAIN),
            hook_point=self.hook_point,
            heldout_mean=(mean / self.kept_tokens).numpy(),
            train_mean=resampled.double().mean(0).numpy(),
            donors=resampled,
            domains=self.domains,
            kept_tokens=self.kept_tokens,
            device=self.device,
            ablated=self.ablated,
        )
        return {
            "features": sae.d_sae,
            **{name: found["metrics"][name]["value"] for name in METRICS},
            "mean_f1": found["domains"]["mean_f1"],
            "pure_features": found["domains"]["pure_features"],
            "top_neuron": found["decoder"]["top_neuron"]["median"],
            "nearest_cosine": found["decoder"]["nearest_cosine"]["median"],
            "best_f1": {domain: entry and entry["f1"] for domain, entry in found["domains"]["best_feature"].items()},
            **self.probed(sae, learned=learned),
        }

    def probed(self, sae: SAE, *, learned: bool = False) -> dict[str, Any]:
        """k-sparse probes of each token's domain and, for `learned` dictionaries, absorption."""
        (train, train_labels), (test, test_labels) = self._seen(sae, TRAIN), self._seen(sae, HELD_OUT)
        found = probe(Labelled(train.acts, train_labels), Labelled(test.acts, test_labels), self.domains)
        kinds = kinds_of_token(token_bytes(self.model.tokenizer, self.model.d_vocab)) if learned else {}
        return {
            "probe": found["mean"],
            "probe_by_domain": found["classes"],
            "absorption": absorption(train, test, kinds, sae.W_dec.numpy()) if learned else None,
        }

    def _seen(self, sae: SAE, split: str) -> tuple[Tokens, np.ndarray]:
        """The kept tokens of a split, and the number of each token's domain."""
        recorder, placed = Recorder(sae.d_sae), FrozenSAE(sae, self.device)
        ids, x, labels = [], [], []
        for block in self.blocks(split):
            keep = block.keep.numpy()
            recorder.add(placed.encode(block.acts.flatten(0, 1)), block.keep.flatten())
            ids.append(block.tokens.numpy()[keep])
            x.append(block.acts[block.keep].float().numpy())
            labels.append(block.domain[keep])
        return Tokens(np.concatenate(ids), np.concatenate(x), recorder.matrix()), np.concatenate(labels)


def _trained_on(setup: Setup, sae: SAE, out: Path, train_tokens: int) -> SAE:
    """A dictionary trained with the recipe and settings of `sae`, on rows of the setup's model held in memory."""
    settings = sae.config.get("train")
    if settings is None:
        raise NoRecipe("the dictionary's config.json does not say how it was trained")
    try:
        config = with_overrides(TrainConfig(), {**_plain(settings), "tokens": train_tokens})
        provenance: dict[str, Any] = {"control": "shuffled_model"}
        if "row_filter" in sae.config:  # the setup's rows are those that it leaves in
            provenance |= {"row_filter": sae.config["row_filter"]}
        rows = baselines.HeldRows(setup.training_rows(train_tokens), batch_tokens=config.batch_tokens, seed=config.seed)
        return loop.train(rows, out, config, provenance=provenance)
    except ValueError as error:  # too few tokens for its schedule, or a recipe that needs more than x
        raise NoRecipe(str(error)) from error


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a config.json, with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
