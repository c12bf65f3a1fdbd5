"""Evaluate a crosscoder on the held-out rows of its sites, and find the control that was trained for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.dictionary.autoencoder import SAE
from sae.evaluation import crosscoder
from sae.evaluation.crosscoder import Means, SiteBlock, SiteModel
from sae.jobs.checkpoint import write_tensors
from sae.kernels import device_named
from sae.lm import LanguageModel, ModelError, load_model
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.shares import shared_out
from sae.pipeline.donors import donors
from sae.pipeline.errors import PipelineError
from sae.pipeline.resolve import model_in, recorded_store, row_filter_progress
from sae.pipeline.rows import hook_point_of
from sae.pipeline.sites import Place
from store.activations import ActivationStore
from store.common import HELD_OUT, TRAIN, can_run, is_control_of, same_model, write_json
from store.filtered import filtered
from store.paired import require_same_rows


def evaluate_crosscoder(
    sae: SAE, directory: Path, model: LanguageModel | str | None, device: str, kernels: str, mesh: Mesh = ONE
) -> dict[str, Any]:
    """Evaluates a crosscoder at each of its sites; writes eval.json and sites.safetensors next to it.

    Raises: PipelineError if a site's store or model is no longer that of training.
    """
    places = recorded_places(sae, directory)
    heldout, train = ([place.totals(split) for place in places] for split in (HELD_OUT, TRAIN))
    result, tensors = crosscoder.evaluate(
        sae,
        models_of(places, model, str(device_named(device))),
        heldout_blocks(places, mesh),
        means=Means(*(np.concatenate([each.mean for each in totals]) for totals in (heldout, train))),
        donors=[donors(place.store, place.hook_point) for place in places],
        kept_tokens=heldout[0].kept_rows,
        device=device,
        kernels=kernels,
        mesh=mesh,
    )
    view = places[0].store
    if not view.row_filter.is_off:
        left_out = view.whole.totals(HELD_OUT, places[0].hook_point).kept_rows - heldout[0].kept_rows
        result["row_filter"] = {**view.row_filter.to_json(), "rows": heldout[0].kept_rows, "rows_left_out": left_out}

    def write() -> dict[str, Any]:
        write_tensors(directory / "sites.safetensors", tensors, {"tokens": heldout[0].kept_rows, "split": HELD_OUT})
        write_json(directory / "eval.json", result)
        return result

    return mesh.on_first(write)


def crosscoder_control(directory: str | Path) -> dict[str, Any] | None:
    """The evaluation of a crosscoder's control, with its `directory`; None if there is none.

    The control is a run in the same parent directory with the same sites and settings, but for `shuffle_sites`.
    """
    directory = Path(directory).absolute()
    config = _json_in(directory / "config.json")
    for other in sorted(directory.parent.iterdir()):
        report = _json_in(other / "eval.json")
        if report.get("kind") == "crosscoder" and is_control_of(_json_in(other / "config.json"), config):
            return {"directory": other.name, **report}
    return None


def _json_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recorded_places(sae: SAE, directory: Path) -> list[Place]:
    """The sites that a crosscoder was trained on, without the rows that its training left out.

    Raises: PipelineError if a store now belongs to another model; StoreError if the rows no longer belong together.
    """
    recorded: list[Mapping[str, Any]] = sae.config["sites"]
    stores: dict[str, ActivationStore] = {}
    places = []
    for site in recorded:
        path = str(recorded_store(directory, site["store"]["path"]))
        store = stores.setdefault(path, ActivationStore.open(path))
        theirs = store.provenance.get("model", {})
        if site["model"] != theirs and not same_model(site["model"], theirs):
            raise PipelineError(
                f"{path} holds activations of {theirs.get('id')}, the crosscoder was trained on those of "
                f"{site['model'].get('id')}, with other weights. Harvest that model's activations there."
            )
        place = Place(str(site["name"]), store, hook_point_of(store, site["hook_point"]))
        if place.width != site["width"]:
            raise PipelineError(
                f"{path} holds rows of {place.width:,} values at {place.hook_point}, the crosscoder was trained on "
                f"{site['width']:,}. Harvest the model's activations there again."
            )
        places.append(place)
    first, *others = stores.values()
    for other in others:
        require_same_rows(first, other, HELD_OUT)
    kept = sae.config.get("row_filter")
    views = {
        path: filtered(store, kept, [place.hook_point for place in places if place.store is store], row_filter_progress)
        for path, store in stores.items()
    }
    return [place._replace(store=views[str(place.store.path)]) for place in places]


def models_of(places: Sequence[Place], asked: LanguageModel | str | None, device: str) -> list[SiteModel]:
    """The models that the sites are hook points of, without those whose activations came as arrays.

    `asked` takes the place of the model with its weights. A hook point that is there twice, of two stores, belongs to
    two entries.
    Raises: PipelineError if a model is not there or has other weights now, or if `asked` is no site's model.
    """
    lm = load_model(asked, device=device) if isinstance(asked, str) else asked
    if lm and not any(same_model(_identity(place), lm.identity()) for place in places):
        theirs = ", ".join(dict.fromkeys(str(_identity(place).get("id")) for place in places))
        raise PipelineError(f"no site of this crosscoder has the weights of {lm.id}; its sites are of {theirs}.")
    found: list[SiteModel] = []
    for n, place in enumerate(places, 1):
        if not can_run(_identity(place)):
            continue
        same = [each for each in found if same_model(each.model.identity(), _identity(place))]
        free = next((each for each in same if place.hook_point not in each.hook_points.values()), None)
        if free is None:
            free = SiteModel(same[0].model if same else _opened(n, place, lm, device), {})
            found.append(free)
        free.hook_points[n] = place.hook_point
    return found


def _identity(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = place.store.provenance["model"]
    return found


def _opened(n: int, place: Place, asked: LanguageModel | None, device: str) -> LanguageModel:
    """The model of site `n`: the one asked for if it has its weights, else by its recorded name."""
    if asked and same_model(asked.identity(), _identity(place)):
        return asked
    try:
        return model_in(place.store, device)
    except ModelError as error:
        raise PipelineError(
            f"site {n}, {place.name}: its losses need a model that cannot be opened here. {error} Name it with "
            "--model, or put it back there."
        ) from error


def heldout_blocks(places: Sequence[Place], mesh: Mesh = ONE) -> Iterator[SiteBlock]:
    """The held-out contexts of all sites, joined, in the models' own units; a block for each of this rank's shards."""
    first = places[0].store
    shards = {shard: marker.contexts for shard, marker in first.markers(HELD_OUT).items() if marker.kept_rows}
    for shard, skipped in shared_out(shards, mesh):
        contexts = first.read_contexts(HELD_OUT, shard)
        parts = [torch.from_numpy(place.store.read_acts(HELD_OUT, shard, place.hook_point)) for place in places]
        yield SiteBlock(
            torch.cat(parts, dim=-1).view(*contexts.tokens.shape, -1),
            torch.from_numpy(contexts.tokens.astype(np.int64)),
            torch.from_numpy(contexts.keep),
            skipped,
        )
