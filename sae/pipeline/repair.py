"""Repair an activation store: harvest again what `verify` finds wrong, and nothing else.

It runs a model; verifying (`stores`) does not, and so loads without torch.
"""

from __future__ import annotations

from pathlib import Path

from sae.harvesting import harvest as harvesting
from sae.lm import LanguageModel, load_model
from sae.pipeline.errors import PipelineError
from sae.pipeline.harvest import Text, provenance_of, source_of, split_rule_of
from sae.pipeline.resolve import model_device
from sae.text.sources import TextSource
from store.activation_input import differences
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN, can_run, contexts_begin_with_bos, same_model


def repair(
    path: str | Path, *, model: LanguageModel | str | None = None, text: Text | None = None, device: str = "auto"
) -> tuple[list[str], list[str]]:
    """Harvests again only what `verify` finds wrong; returns the problems found, and those that remain.

    The model and the text are those that the store names, unless given; their hashes must be those of the store.
    Raises: PipelineError listing what differs, before anything is changed; StoreError when nothing can be rebuilt.
    """
    restored = ActivationStore.restore_metadata(path)
    store = ActivationStore.open(path)
    problems = store.verify()
    found = restored + [problem.text for problem in problems]
    bad = {
        split: {p.shard for p in problems if p.split == split and p.shard is not None} for split in (HELD_OUT, TRAIN)
    }
    if any(bad.values()) and not can_run(store.provenance.get("model", {})):
        markers = ", ".join(store.place.where(p.key) for p in problems if p.key)
        raise PipelineError(
            f"{store.path} was made from arrays, which are read again to repair it: delete {markers} and repeat the "
            "command that made it (sae harvest --from). It writes these shards again, and nothing else."
        )
    if any(bad.values()):
        lm, source = _as_harvested(store, model, text, device)
        sums = {(split, shard): store.recorded_files(split, shard) for split in bad for shard in bad[split]}
        with store.hold():
            for problem in problems:
                store.clear(problem)
            context_bos = contexts_begin_with_bos(store.provenance)
            harvesting.harvest(lm, source, store, rule=split_rule_of(store), only=bad, context_bos=context_bos)
        left = [problem.text for problem in store.verify()] + [
            f"{store.path}: {split} shard {shard} is whole again, but with other bytes than before: its activations "
            "differ in the last digits (harvested on another machine, or with another number of threads?)"
            for (split, shard), before in sums.items()
            if before and before != store.recorded_files(split, shard)
        ]
        return found, left
    if problems and all(len(store.markers(split)) == store.n_shards[split] for split in (HELD_OUT, TRAIN)):
        store.finish()
    return found, [problem.text for problem in store.verify()]


def _as_harvested(
    store: ActivationStore, model: LanguageModel | str | None, text: Text | None, device: str
) -> tuple[LanguageModel, TextSource]:
    derived = {"merged_from", "subset_of"} & store.provenance.keys()  # their shards have new numbers
    if derived or "model" not in store.provenance or not (text or store.provenance.get("text_specs")):
        raise PipelineError(
            f"{store.path} does not say from which model and text it was harvested (a merged or cut store does not): "
            "repair the stores it was made from, and make it again."
        )
    recorded = store.provenance
    chosen = model or recorded["model"]["id"]
    if not isinstance(chosen, LanguageModel):
        chosen = load_model(chosen, device=model_device(device), weights_sha256=recorded["model"].get("sha256"))
    lm = chosen
    source = source_of(
        text or recorded["text_specs"],
        text_column=recorded.get("text_column"),
        special_tokens=recorded.get("special_tokens", {}).get("in_text", False),
    ).for_model(lm)
    ours = provenance_of(lm, source, contexts_begin_with_bos(recorded), split_rule_of(store))
    decisive = ("tokenizer_sha256", "text_sha256", "bos", "weight_processing", "held_out", "chat_template_sha256")
    named = store.provenance["model"]
    there = {"model_sha256": named["sha256"], **{k: store.provenance.get(k) for k in decisive}}
    found = named["sha256"] if same_model(named, ours["model"]) else lm.weights_sha256
    differing = differences(there, {"model_sha256": found, **{k: ours.get(k) for k in decisive}})
    if differing:
        raise PipelineError(
            f"{store.path} was harvested from another model or text; nothing in it was changed:\n  "
            + "\n  ".join(differing)
            + "\nName the model and the text it was harvested from with --model and --text."
        )
    return lm, source
