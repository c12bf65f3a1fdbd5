"""The measures of the lens `keys`: do features say what came before, and do induction heads' keys consist of them?

The same is asked of principal components, of the heads' dimensions, of a dictionary of a shuffled model and of random
directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.analysis.untrained import matrices_shuffled
from sae.circuits.head_measures import COPIES, LENGTH, made_up_text
from sae.circuits.head_measures import Texts as HeadTexts
from sae.circuits.heads import repeated_tokens
from sae.circuits.intervals import mean_interval, numbers, ratio_of_means
from sae.circuits.patching import FORMULA, path_patching, runs_of
from sae.circuits.previous_token import GOOD, Rules, advantage, keys_of, rules_of
from sae.circuits.results import Control, Measure
from sae.circuits.sites import Site, heads_of
from sae.circuits.tasks import Task, induction_of
from sae.circuits.units import Units, UnitsByPrompt, components, features, head_dimensions
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel, ModelError, layer_of

SHUFFLED = "the same model with the entries of every weight matrix shuffled"
SIZES = (1, 2, 4, 8, 16)
WHAT = {
    "components": "principal components of the same activations, each side of the mean a unit",
    "head_dimensions": "the entries of the heads' outputs, each side of the mean a unit",
    "random_dictionary": "random directions, as many of them active at a time as of the dictionary's features",
    "shuffled_model": "a dictionary trained by the same recipe on the model with shuffled weights, on that model",
    "current_token": "the same features, with rules about the current token",
    "shuffled_labels": "the same features, with the tokens before in a random order",
    "shuffled_rules": "the same features, each with the rule of another one",
    "other_features": "as many features whose rules are about other tokens",
    "whole_output": "everything that attention of the layer writes",
    "random_direction": "a random direction with the norm of the change",
}


@dataclass(frozen=True, eq=False)
class Texts:
    """Contexts: rules are chosen on `train` and judged on `held_out`."""

    train: Int[Tensor, "contexts pos"]
    held_out: Int[Tensor, "more pos"]


@dataclass(frozen=True, eq=False)
class Dictionaries:
    """A dictionary of `hook_point`, and perhaps one of the same model with its weights shuffled from a seed."""

    sae: SAE
    hook_point: str
    shuffled: SAE | None = None
    shuffle_seed: int = 0


class _Judged(NamedTuple):
    rules: Rules
    labels: Int[Tensor, " row"]  # of the held-out rows

    @property
    def coverage(self) -> Float[Tensor, " row"]:
        return self.rules.covered(self.labels).double()


def key_measures(
    model: LanguageModel,
    found: Dictionaries,
    texts: Texts,
    layer: int,
    *,
    prompts: int = 64,
    made_up: int = 10,
    seed: int = 0,
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, Tensor]]:
    """All measures about the heads of `layer`; labels; and, by feature, its rule's token and F1, beside its controls'.

    Scores and paths are measured in tokens that a feature's rule is about, and the share of the score in any tokens,
    too. Raises: ModelError for a hook point that is not what attention of an earlier layer writes; TaskError if fewer
    than 24 tokens have a feature.
    """
    if not found.hook_point.endswith("hook_attn_out") or layer_of(found.hook_point) >= layer:
        raise ModelError(
            f"the lens keys needs a dictionary of blocks.L.hook_attn_out with L before layer {layer}; got "
            f"{found.hook_point}."
        )
    kinds = _kinds(model, found, texts.train, seed)
    judged = {name: _judge(model, units, texts) for name, units in kinds.items()}
    own = judged["features"]
    with_others = _with_other_rules(model, found, texts, judged, seed)
    measures = _of_rules(with_others)
    rules = {name: each.rules.token for name, each in judged.items()}
    tokens = [token for token in own.rules.good_tokens if token != model.bos_id]
    task = induction_of(model, tokens, prompts, seed=seed)
    length = min(LENGTH, len(tokens), (model.context_tokens - 1) // COPIES)
    repeated = repeated_tokens(
        torch.tensor(tokens), length=length, copies=COPIES, texts=made_up, bos_id=model.bos_id, seed=seed
    )
    measures |= _of_scores(model, kinds, rules, repeated, layer, seed)
    usual = made_up_text(model, HeadTexts(texts.held_out, texts.train), LENGTH, COPIES, made_up, seed)
    measures["share_of_score_any"] = _of_scores(model, kinds, rules, usual, layer, seed)["share_of_score"]
    measures["into_k"] = _into_keys(model, kinds, rules, task, layer, seed)
    heads = [f"L{layer}.head.{h}" for h in range(model.n_heads)]
    arrays = {"rule_token": own.rules.token, "rule_f1": own.rules.f1.float(), "rule_firings": own.rules.firings}
    for control in ("current_token", "shuffled_labels"):
        arrays[f"rule_f1_{control}"] = with_others[control].rules.f1.float()
    return measures, {"head": heads, "units": list(map(str, SIZES)), "tokens_with_rule": len(tokens)}, arrays


def _kinds(
    model: LanguageModel, found: Dictionaries, train: Int[Tensor, "contexts pos"], seed: int
) -> dict[str, Units]:
    z_hook = f"blocks.{layer_of(found.hook_point)}.attn.hook_z"
    out, z = (model.capture(train, hook)[:, 1:].flatten(0, 1) for hook in (found.hook_point, z_hook))
    return {
        "features": features(found.sae, found.hook_point),
        "components": components(out, found.hook_point),
        "head_dimensions": head_dimensions(model, z, z_hook),
        "random_dictionary": features(_random_twin(found.sae, out, seed), found.hook_point),
    }


def _random_twin(sae: SAE, rows: Float[Tensor, "row d_in"], seed: int) -> SAE:
    """Random unit directions; as many are active per row as the dictionary has active features on average."""
    k = max(1, round(float((sae.encode(rows[:4096]) > 0).float().sum(-1).mean())))
    made = SAE(sae.d_in, sae.d_sae, activation="topk", k=k).requires_grad_(False)
    directions = torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(seed))
    made.W_dec.copy_(directions / directions.norm(dim=-1, keepdim=True))
    made.W_enc.copy_(made.W_dec.T)
    made.b_dec.copy_(rows.mean(0))
    return made.eval()


# --- rules -----------------------------------------------------------------------------------------------------------


def _rows(
    model: LanguageModel, units: Units, tokens: Int[Tensor, "contexts pos"]
) -> tuple[Float[Tensor, "row unit"], Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Activations, the token before and the current token, without the first position."""
    acts = torch.cat(
        [units.acts(model.capture(part, units.hook_point))[:, 1:].flatten(0, 1) for part in torch.split(tokens, 8)]
    )
    return acts, tokens[:, :-1].flatten(), tokens[:, 1:].flatten()


def _judge(model: LanguageModel, units: Units, texts: Texts) -> _Judged:
    chosen, judged = _rows(model, units, texts.train), _rows(model, units, texts.held_out)
    return _Judged(rules_of(chosen[:2], judged[:2], model.d_vocab), judged[1])


def _with_other_rules(
    model: LanguageModel, found: Dictionaries, texts: Texts, judged: Mapping[str, _Judged], seed: int
) -> dict[str, _Judged]:
    """The judgements, and those of the features by other labels and of the shuffled model's dictionary."""
    units = features(found.sae, found.hook_point)
    chosen, held_out = _rows(model, units, texts.train), _rows(model, units, texts.held_out)
    generator = torch.Generator().manual_seed(seed)
    mixed = [each[1][torch.randperm(len(each[1]), generator=generator)] for each in (chosen, held_out)]
    controls = {
        "current_token": _Judged(
            rules_of((chosen[0], chosen[2]), (held_out[0], held_out[2]), model.d_vocab), held_out[2]
        ),
        "shuffled_labels": _Judged(rules_of((chosen[0], mixed[0]), (held_out[0], mixed[1]), model.d_vocab), mixed[1]),
    }
    if found.shuffled is not None:
        with matrices_shuffled(model, found.shuffle_seed):
            controls["shuffled_model"] = _judge(model, features(found.shuffled, found.hook_point), texts)
    return {**judged, **controls}


def _of_rules(judged: Mapping[str, _Judged]) -> dict[str, Measure]:
    """How many units have a good rule, and how much of the text is covered by the good rules."""
    own = judged["features"]
    good = (own.rules.f1[own.rules.judged] >= GOOD).double()
    others = {name: each for name, each in judged.items() if name != "features"}
    return {
        "units_with_rule": Measure(
            own.rules.good_share,
            max(1, len(good)),
            "features that fire 10 times or more on held-out text",
            f"share of units whose rule “the token before is X”, chosen on training text, has a held-out F1 ≥ {GOOD}",
            {name: Control(each.rules.good_share, WHAT[name]) for name, each in others.items()},
            numbers(mean_interval(good)) if len(good) > 1 else None,
        ),
        "tokens_covered": Measure(
            float(own.coverage.mean()),
            len(own.labels),
            "held-out tokens",
            f"share of tokens whose token before is the X of a unit with F1 ≥ {GOOD}",
            {
                name: Control(float(each.coverage.mean()), WHAT[name], numbers(mean_interval(each.coverage)))
                for name, each in others.items()
            },
            numbers(mean_interval(own.coverage)),
        ),
    }


# --- scores ----------------------------------------------------------------------------------------------------------


def _of_scores(
    model: LanguageModel,
    kinds: Mapping[str, Units],
    rules: Mapping[str, Int[Tensor, " unit"]],
    repeated: Int[Tensor, "text pos"],
    layer: int,
    seed: int,
) -> dict[str, Measure]:
    """Shares of each head's advantage: of the units with the right rule, and of the largest units."""
    order = torch.randperm(len(kinds["features"]), generator=torch.Generator().manual_seed(seed))
    asked = {name: (units, rules[name]) for name, units in kinds.items()}
    asked["shuffled_rules"] = (kinds["features"], rules["features"][order])
    whole, matched, largest = _advantages(model, asked, repeated, layer)
    values = {name: ratio_by_head(each, whole) for name, each in matched.items()}
    by_size = {name: ratio_by_head(each, whole) for name, each in largest.items() if name != "shuffled_rules"}
    n, texts = len(repeated), "texts of repeated random tokens"
    score = "score of the token after an earlier copy − mean score of other sources, q·k/√d_head, norm scale held"
    with matrices_shuffled(model, seed):
        blind = _whole(model, repeated, layer, kinds["features"])
    return {
        "induction_score": Measure(
            whole.mean(0),
            n,
            texts,
            score,
            {"shuffled_weights": Control(blind.mean(0), SHUFFLED, mean_interval(blind))},
            mean_interval(whole),
            ("head",),
        ),
        "share_of_score": Measure(
            values["features"][0],
            n,
            texts,
            f"share of the {score} that comes, at each source, through units whose rule is the token before it",
            {name: Control(v, WHAT[name], ci) for name, (v, ci) in values.items() if name != "features"},
            values["features"][1],
            ("head",),
        ),
        "share_of_largest": Measure(
            by_size["features"][0],
            n,
            texts,
            f"share of the {score} that comes through the k largest units at each source, by a · ‖written‖",
            {name: Control(v, WHAT[name], ci) for name, (v, ci) in by_size.items() if name != "features"},
            by_size["features"][1],
            ("head", "units"),
        ),
    }


def _advantages(
    model: LanguageModel,
    asked: Mapping[str, tuple[Units, Int[Tensor, " unit"]]],
    repeated: Int[Tensor, "text pos"],
    layer: int,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Of the whole key [text, head], of matched units [text, head], and of the largest ones [text, head, units]."""
    whole = _whole(model, repeated, layer, next(iter(asked.values()))[0])
    matched: dict[str, Tensor] = {}
    largest: dict[str, Tensor] = {}
    for name, (units, rule) in asked.items():
        by_head = [(head, keys_of(model, repeated, head, units, rule, SIZES)) for head in _heads(model, layer)]
        matched[name] = torch.stack([advantage(model, repeated, head, key.matched) for head, key in by_head], 1)
        sizes = [[advantage(model, repeated, head, part) for part in key.largest] for head, key in by_head]
        largest[name] = torch.stack([torch.stack(each, 1) for each in sizes], 1)
    return whole, matched, largest


def _heads(model: LanguageModel, layer: int) -> list[tuple[int, int]]:
    return [(layer, head) for head in range(model.n_heads)]


def _whole(
    model: LanguageModel, repeated: Int[Tensor, "text pos"], layer: int, units: Units
) -> Float[Tensor, "text head"]:
    """The advantage of each head by its whole keys."""
    none = torch.full((len(units),), -1)
    return torch.stack(
        [
            advantage(model, repeated, head, keys_of(model, repeated, head, units, none, ()).whole)
            for head in _heads(model, layer)
        ],
        1,
    )


def ratio_by_head(
    over: Float[Tensor, "text head ..."], under: Float[Tensor, "text head"]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Σ over / Σ under over texts, for each head with its own denominator."""
    each = [ratio_of_means(over[:, h], under[:, h]) for h in range(under.shape[1])]
    low, high = (torch.stack([interval[side] for _, interval in each]) for side in (0, 1))
    return torch.stack([value for value, _ in each]), (low, high)


# --- paths -----------------------------------------------------------------------------------------------------------


def _into_keys(
    model: LanguageModel,
    kinds: Mapping[str, Units],
    rules: Mapping[str, Int[Tensor, " unit"]],
    task: Task,
    layer: int,
    seed: int,
) -> Measure:
    """Path patching: the units that say `first` or `other` came before take their corrupt values, heard by one key."""
    hook = kinds["features"].hook_point
    z_hooks = [f"blocks.{each}.attn.hook_z" for each in range(model.n_layers)]
    receivers = heads_of(model, [layer], "k")
    runs = runs_of(model, task, [hook, *z_hooks, receivers[0].hook_point])
    told = torch.stack([task.clean[torch.arange(len(task)), task.positions[place]] for place in ("first", "other")], 1)

    def site(name: str, rule: Int[Tensor, " unit"], units: Units) -> Site:
        chosen: Bool[Tensor, "prompt unit"] = (rule[None, :, None] == told[:, None]).any(-1)
        return UnitsByPrompt(name, units.hook_point, units=units, chosen=chosen)

    order = torch.randperm(len(kinds["features"]), generator=torch.Generator().manual_seed(seed))
    senders = {name: site(name, rules[name], units) for name, units in kinds.items()}
    senders["other_features"] = site("other features", rules["features"][order], kinds["features"])
    senders["whole_output"] = Site("attention", hook)
    found = path_patching(runs, list(senders.values()), receivers, z_hooks, seed=seed)
    of = dict(zip(senders, range(len(senders)), strict=True))
    value, ci95, random = found.value, found.ci95, found.controls["random_direction"]
    assert isinstance(value, Tensor)
    assert isinstance(random.value, Tensor)
    assert ci95 is not None
    low, high = (torch.as_tensor(end) for end in ci95)
    ends = {name: (low[i], high[i]) for name, i in of.items()}
    controls = {name: Control(value[i], WHAT[name], ends[name]) for name, i in of.items() if name != "features"}
    controls["random_direction"] = Control(random.value[of["features"]], WHAT["random_direction"])
    return Measure(
        value[of["features"]],
        len(task),
        "prompts",
        f"{FORMULA}; features whose rule is one of the two earlier tokens take their corrupt values, heard by one "
        "head's key alone: 1 breaks nothing, 0 all of it",
        controls,
        ends["features"],
        ("head",),
    )
