"""Lenses: one function each, on a model or on a dictionary and its model. Results go to files, with their controls."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sae.circuits import erasing, world
from sae.circuits.circuit import Question, answer
from sae.circuits.depth import Translator, Tuning, feature_depth, layer_depth
from sae.circuits.growth_measures import Snapshot, growth_measures
from sae.circuits.head_measures import Texts, head_measures
from sae.circuits.key_measures import Dictionaries, key_measures
from sae.circuits.key_measures import Texts as KeyTexts
from sae.circuits.known_facts import requests_of, variants
from sae.circuits.recall import recall
from sae.circuits.results import DIRECTORY, Result, write_result
from sae.circuits.rome import rome, second_moment
from sae.circuits.tasks import END, task_of
from sae.circuits.text import Contexts, contexts_of
from sae.circuits.tracing import Corruption, causal_tracing
from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load
from sae.lm import LanguageModel, NativeModel, load_model
from sae.lm.base import layer_of, read_json_file
from sae.lm.pretrain import KEPT
from sae.pipeline.errors import PipelineError
from sae.pipeline.harvest import Text, source_of
from sae.pipeline.resolve import model_device, open_pair
from sae.text.sources import TextSource
from store.common import HELD_OUT, TRAIN

RUNS = Path("runs")  # where the results of models go
LARGEST_MAPS_BYTES = 1 << 28  # of a tuned lens, in a result
SHUFFLED_MODEL = "controls/shuffled_model"  # in a dictionary's directory, made by `sae controls`


@dataclass(frozen=True)
class Subject:
    """What a lens looks at: a model, perhaps a dictionary of it, and the directory for results."""

    model: LanguageModel
    sae: SAE | None
    directory: Path
    dictionary: Path | None = None  # its directory

    @property
    def about(self) -> dict[str, Any]:
        """What a result records about it."""
        found: dict[str, Any] = {"model": self.model.identity()}
        return found if self.sae is None else found | {"hook_point": self.hook_point}

    @property
    def hook_point(self) -> str:
        """That of the dictionary. Raises: PipelineError without a dictionary, or if it does not say."""
        if self.sae is None:
            raise PipelineError("this needs a dictionary: name its directory instead of a model.")
        if "hook_point" not in self.sae.config:
            raise PipelineError("this dictionary does not say which hook point it was trained on.")
        return str(self.sae.config["hook_point"])


def lens(
    name: str, path: LanguageModel | str | Path, *, out: str | Path | None = None, device: str = "auto", **settings: Any
) -> Path:
    """Runs one lens on a model or a dictionary and writes what it found; returns the JSON file.

    `path` is a dictionary's directory, or a model as `sae.load_model` finds it. Results go to `lenses/` in the
    dictionary's directory, or to `runs/lenses/<model>/`; `out` names another directory. `settings` are those of the
    lens's own function in `sae.pipeline.lenses`.
    Raises: PipelineError for an unknown lens, or a setting that it does not have.
    """
    if name not in LENSES:
        raise PipelineError(f"there is no lens {name!r}; there are {', '.join(sorted(LENSES))}.")
    run = LENSES[name]
    takes = [each for each in inspect.signature(run).parameters if each != "subject"]
    if unknown := [setting for setting in settings if setting not in takes]:
        raise PipelineError(f"the lens {name} has no setting {unknown[0]!r}; it has {', '.join(takes) or 'none'}.")
    subject = subject_of(path, out=out, device=device)
    with subject.model.lock:
        result = run(subject, **settings)
    return write_result(result, subject.directory)


def subject_of(path: LanguageModel | str | Path, *, out: str | Path | None = None, device: str = "auto") -> Subject:
    """A dictionary with its model, or a model alone. Raises: PipelineError, ModelError if there is neither."""
    if isinstance(path, LanguageModel):
        lm, sae = path, None
    elif (Path(path) / "config.json").is_file() and read_json_file(Path(path) / "config.json").get("kind") == "sae":
        sae, lm = open_pair(path, device=device)
    else:
        lm, sae = load_model(path, device=model_device(device)), None
    if out is None:
        out = RUNS / DIRECTORY / Path(lm.id).name if sae is None else Path(str(path)) / DIRECTORY
    return Subject(lm, sae, Path(out), None if sae is None else Path(str(path)))


def held_out_contexts(lm: LanguageModel, text: Text | None, n: int, split: str = HELD_OUT) -> Contexts:
    """`n` contexts of held-out text (by default of the text on this machine)."""
    return contexts_of(lm, source_of("default" if text is None else text), split, n)


def depth(subject: Subject, *, text: Text | None = None, n: int = 64, seed: int = 0) -> Result:
    """How early the model's prediction is there: the logit lens and the tuned lens at each depth, and by feature.

    `n` contexts of held-out text are measured; the tuned lens is trained on training text. Its maps are arrays of the
    result, `tuned_weight` and `tuned_bias` by depth, unless they take more than 256 MB.
    """
    lm = subject.model
    held_out, train = (held_out_contexts(lm, text, size, split) for split, size in ((HELD_OUT, n), (TRAIN, 4 * n)))
    tuning = Tuning(seed=seed)
    measures, readings = layer_depth(lm, train, held_out, tuning)
    if subject.sae is not None:
        measures |= feature_depth(lm, subject.sae, subject.hook_point, held_out, readings, seed=seed)
    about = subject.about | {"text": source_of("default" if text is None else text).name, "tuning": asdict(tuning)}
    return Result("depth", measures, about, labels={"depth": readings.names}, arrays=_kept_maps(readings.maps))


def _kept_maps(maps: Sequence[Translator]) -> dict[str, Tensor]:
    if sum(4 * each.weight.numel() for each in maps) > LARGEST_MAPS_BYTES:
        return {}
    stacked = {"weight": [each.weight for each in maps], "bias": [each.bias for each in maps]}
    return {f"tuned_{name}": torch.stack(parts).float().cpu() for name, parts in stacked.items()}


def heads(subject: Subject, *, text: Text | None = None, n: int = 64, seed: int = 0) -> Result:
    """What each attention head does: where it looks, what it writes, what breaks without it.

    `n` contexts of held-out text are measured; bigrams and skip-trigrams are counted in 32 times as many of the
    training text.
    """
    lm = subject.model
    held_out, counted = (held_out_contexts(lm, text, size, split) for split, size in ((HELD_OUT, n), (TRAIN, 32 * n)))
    measures, labels = head_measures(lm, Texts(held_out.tokens, counted.tokens), seed=seed)
    about = {"model": lm.identity(), "text": source_of("default" if text is None else text).name, "seed": seed}
    return Result("heads", measures, about, labels=labels)


def growth(subject: Subject, *, text: Text | None = None, n: int = 2048, seed: int = 0) -> Result:
    """How the model came to use its context: its snapshots on the same `n` contexts of held-out text."""
    lm = subject.model
    snapshots = snapshots_of(lm)
    held_out = held_out_contexts(lm, text, n)
    measures, labels = growth_measures(snapshots, held_out.tokens, seed=seed)
    about = {"model": lm.identity(), "text": source_of("default" if text is None else text).name, "seed": seed}
    return Result("growth", measures, about, labels=labels)


def snapshots_of(lm: LanguageModel) -> list[Snapshot]:
    """The copies that training kept, and the model itself where it says how many tokens it has seen; fewest first.

    Raises: PipelineError if there are none.
    """
    kept = sorted((lm.directory / KEPT).glob("*/model.safetensors")) if isinstance(lm, NativeModel) else []
    if not kept or not isinstance(lm, NativeModel):
        raise PipelineError(
            f"{lm.id} has no snapshots: growth needs copies of the model from its training, which `sae pretrain "
            "--keep-at TOKENS …` keeps in the model's directory."
        )
    found = {} if lm.trained_tokens is None else {lm.trained_tokens: lm.directory}
    found |= {int(path.parent.name.partition("-")[0]): path.parent for path in kept}
    return [Snapshot(tokens, partial(load_model, found[tokens], device=str(lm.device))) for tokens in sorted(found)]


def circuit(
    subject: Subject,
    *,
    task: str = "induction",
    by: str = "position",
    method: str = "activation",
    layer: int | None = None,
    n: int = 32,
    seed: int = 0,
) -> Result:
    """Which parts of the model carry the answer of a task, by patching `n` pairs of prompts.

    `by` is position (the residual stream, attention and MLP outputs at named positions), head, neuron or feature; with
    `layer`, of that layer only (for paths, its heads are the receivers). `method` is activation, gradient, path (heads,
    or features of the dictionary, into heads' q, k and v) or judge (a circuit of heads found by greedy removal).
    Raises: TaskError, PatchingError for a task that the model does not know or do, or a part that it does not have.
    """
    lm = subject.model
    found = task_of(lm, task, n, seed=seed)
    hook_point = None if subject.sae is None else subject.hook_point
    question = Question(by, method, layer, subject.sae, hook_point, seed)
    measures, labels = answer(lm, found, question)
    texts = (found.clean, found.corrupt)
    end = int(found.positions[END][0]) + 1  # padding comes after it
    labels["first_prompts"] = [lm.tokenizer.decode(t[0, :end].tolist(), skip_special_tokens=False) for t in texts]
    about = subject.about | {"task": task, "by": by, "method": method, "layer": layer, "seed": seed}
    return Result("circuit", measures, about, f"{found.name}-{method}-{by}", labels)


def facts(subject: Subject, *, method: str = "gaussian", layer: int = 0, n: int = 30, seed: int = 0) -> Result:
    """Where the facts of the made-up world are, and what editing one changes, in a model that was trained on them.

    `method` is recall (does the model know what it was told?), gaussian or swap (causal tracing by how the subject is
    corrupted), or rome, which edits `n` facts in `layer`. Raises: TaskError for a model whose tokenizer does not have
    the world's words; PipelineError.
    """
    lm = subject.model
    about = subject.about | {"method": method, "seed": seed}
    if method == "recall":
        measures, labels = recall(lm, n, seed=seed)
        return Result("facts", measures, about, method, labels)
    if method in ("gaussian", "swap"):
        found = task_of(lm, "facts", n, seed=seed)
        measures, labels = causal_tracing(lm, found, cast(Corruption, method), seed=seed)
        return Result("facts", measures, about, method, labels)
    if method != "rome":
        raise PipelineError(f"--method must be recall, gaussian, swap or rome; got {method!r}.")
    if not 0 <= layer < lm.n_layers:
        raise PipelineError(f"--layer {layer} does not exist; {lm.id} has layers 0 … {lm.n_layers - 1}.")
    edits, meanings = variants(layer, lm.n_layers)
    source = TextSource("made-up world", lambda _: world.documents(4000), "made-up world")
    text = contexts_of(lm, source, TRAIN, 512, context_tokens=64)
    moments = {each.layer: second_moment(lm, text.tokens, each.layer) for each in edits.values()}
    measures = rome(lm, requests_of(lm, n, seed=seed), edits, moments.__getitem__, meanings=meanings)
    return Result("facts", measures, about | {"layer": layer}, "rome")


def erase(
    subject: Subject,
    *,
    concept: str = "",
    text: Text | None = None,
    layer: int | None = None,
    n: int = 128,
    seed: int = 0,
) -> Result:
    """What erasing a concept, a domain of the text, by LEACE costs, at the dictionary's hook point or after `layer`.

    The eraser is fitted on `2 n` contexts of training text and measured on `n` of held-out text; its projection and
    mean are arrays of the result. Raises: ConceptError for a domain that the text does not have; ErasureError.
    """
    lm = subject.model
    hook_point = f"blocks.{lm.n_layers - 1 if layer is None else layer}.hook_resid_post"
    hook_point = hook_point if subject.sae is None else subject.hook_point
    train, held_out = (held_out_contexts(lm, text, size, split) for split, size in ((TRAIN, 2 * n), (HELD_OUT, n)))
    measures, eraser = erasing.erase(lm, hook_point, concept, train, held_out, sae=subject.sae, seed=seed)
    about = subject.about | {"hook_point": hook_point, "concept": concept, "rank": eraser.rank, "seed": seed}
    arrays = {"projection": eraser.projection, "mean": eraser.mean}
    return Result("erase", measures, about, re.sub(r"[^\w-]+", "_", concept), arrays=arrays)


def keys(subject: Subject, *, text: Text | None = None, layer: int | None = None, n: int = 64, seed: int = 0) -> Result:
    """Whether features of a layer's attention output say which token came before, and make up induction heads' keys.

    The heads are those of `layer` (default: the one after the dictionary's). Rules of features are chosen on `2 n`
    contexts of training text and judged on `n` of held-out text. The dictionary of the shuffled model that `sae
    controls` made is a control where there is one. Raises: ModelError, PipelineError for another dictionary; TaskError
    if its features are about too few tokens.
    """
    lm, hook_point = subject.model, subject.hook_point
    assert subject.sae is not None
    shuffled = None
    if subject.dictionary is not None and (subject.dictionary / SHUFFLED_MODEL / "sae.safetensors").is_file():
        shuffled = load(subject.dictionary / SHUFFLED_MODEL)
    train, held_out = (held_out_contexts(lm, text, size, split) for split, size in ((TRAIN, 2 * n), (HELD_OUT, n)))
    reader = layer_of(hook_point) + 1 if layer is None else layer
    measures, labels, arrays = key_measures(
        lm,
        Dictionaries(subject.sae, hook_point, shuffled),
        KeyTexts(train.tokens, held_out.tokens),
        reader,
        prompts=n,
        seed=seed,
    )
    return Result("keys", measures, subject.about | {"layer": reader, "seed": seed}, labels=labels, arrays=arrays)


LENSES: dict[str, Callable[..., Result]] = {
    "circuit": circuit,
    "depth": depth,
    "erase": erase,
    "facts": facts,
    "growth": growth,
    "heads": heads,
    "keys": keys,
}
