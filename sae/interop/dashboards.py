"""Reads feature pages of other tools: SAEDashboard or Neuronpedia JSON, and the files behind the paper's own page.

Such a dump holds samples of a feature's firings, not all of them, and token strings, not ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sae.interop.files import InteropError

MAX_FEATURES = 1 << 24
MAX_TEXT = 8192  # tokens
MAX_FILE_BYTES = 1 << 30
ESCAPED = re.compile(r"(?:\\x[89a-fA-F][0-9a-fA-F])+")  # bytes of an incomplete character, written as text


@dataclass(frozen=True)
class Text:
    """Tokens with the feature's activation on each. `hit` is the position for which the text was chosen, `loss` the
    change of each token's loss by ablation (nats)."""

    group: str
    tokens: list[bytes]
    acts: np.ndarray
    hit: int
    loss: np.ndarray | None = None


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie between `edges[i]` and `edges[i + 1]`."""

    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class DumpedFeature:
    """The data of one feature in a dump. Missing values are nan (`density`, `max`), None or empty."""

    feature: int
    texts: list[Text]
    density: float = float("nan")
    max: float = float("nan")
    acts: Histogram | None = None
    logits: Histogram | None = None
    raises: list[tuple[bytes, float]] = field(default_factory=list)
    lowers: list[tuple[bytes, float]] = field(default_factory=list)
    neurons: list[tuple[int, float]] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)


def files(source: Path) -> list[Path]:
    """The .json files of a dump (a directory, or one file), sorted by their numbers; symbolic links are skipped.

    Raises: InteropError when there is no such file.
    """
    found = [source] if source.is_file() else sorted(source.rglob("*.json"), key=_by_number)
    found = [path for path in found if not path.is_symlink() and path.name not in ("run_settings.json", "config.json")]
    if not found:
        raise InteropError(f"{source} holds no .json file; give the directory of the dump, or one of its files.")
    return found


def _by_number(path: Path) -> tuple[str, list[int], str]:
    return (str(path.parent), [int(digits) for digits in re.findall(r"\d{1,9}", path.name)], path.name)


def read(path: Path, format: str) -> Iterator[DumpedFeature]:
    """The features of one file. Raises: InteropError naming the file and the problem."""
    for entry in _entries(path, format):
        try:
            yield READERS[format](entry)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InteropError(
                f"{path}: feature {str(_number(entry))[:40]} cannot be read as {format}: {what[:300]}."
            ) from error


def _entries(path: Path, format: str) -> list[Mapping[str, Any]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InteropError(
                f"{path} has {path.stat().st_size:,} bytes; files of at most {MAX_FILE_BYTES:,} bytes can be read."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except InteropError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{path} cannot be read as JSON: {str(error)[:300]}") from error
    if isinstance(content, dict) and format == "sae-dashboard" and isinstance(content.get("features"), list):
        origin = {k: str(content[k]) for k in ("model_id", "layer", "sae_set") if k in content}
        entries = [each | {"origin": origin} if isinstance(each, dict) else each for each in content["features"]]
    else:
        entries = [content]
    for entry in entries:
        if not isinstance(entry, dict) or _number(entry) is None:
            raise InteropError(f"{path}: expected {EXPECTED[format]}.")
    return entries


def _number(entry: Mapping[str, Any]) -> Any:
    return entry.get("feature_index", entry.get("index"))


# --- SAEDashboard, Neuronpedia ----------------------------------------------------------------------------------------


def _dashboard(entry: Mapping[str, Any]) -> DumpedFeature:
    activations = entry.get("activations") or []
    return DumpedFeature(
        feature=_feature_number(_number(entry)),
        texts=[_dashboard_text(each) for each in activations],
        density=_number_or_nan(entry.get("frac_nonzero"), "frac_nonzero"),
        max=_number_or_nan(entry.get("maxActApprox"), "maxActApprox"),
        acts=_around(entry, "freq_hist_data_bar"),
        logits=_around(entry, "logits_hist_data_bar"),
        raises=_weights(entry.get("pos_str"), entry.get("pos_values"), "pos"),
        lowers=_weights(entry.get("neg_str"), entry.get("neg_values"), "neg"),
        neurons=_neurons(entry.get("neuron_alignment_indices"), entry.get("neuron_alignment_values")),
        origin=dict(entry.get("origin") or {}),
    )


def _dashboard_text(entry: Mapping[str, Any]) -> Text:
    tokens, acts = _tokens(entry["tokens"]), _numbers(entry["values"], "values", len(entry["tokens"]))
    low, high = (entry.get(a, entry.get(b)) for a, b in (("bin_min", "binMin"), ("bin_max", "binMax")))
    group = "Samples"
    if low is not None and high is not None:
        top = float(high) < 0 or float(low) < 0  # the top activations have the bin −1
        group = "Top activations" if top else f"Activation {float(low):.3g} … {float(high):.3g}"
        share = entry.get("bin_contains", entry.get("binContains"))
        if not top and share is not None:
            group += f" ({float(share):.3%} of all tokens)"
    hit = entry.get("qualifying_token_index", entry.get("qualifyingTokenIndex"))
    return Text(group, tokens, acts, _hit(acts, hit))


def _around(entry: Mapping[str, Any], name: str) -> Histogram | None:
    """A histogram given by the centres of its bars, which are equally wide."""
    centres, counts = entry.get(f"{name}_values") or [], entry.get(f"{name}_heights") or []
    if not len(centres):
        return None
    at, heights = _numbers(centres, name, len(centres)), _numbers(counts, name, len(centres))
    width = float(at[1] - at[0]) if len(at) > 1 else max(2 * abs(float(at[0])), 1e-6)
    return Histogram(heights, np.append(at - width / 2, at[-1] + width / 2))


# --- the paper's page -------------------------------------------------------------------------------------------------


def _paper(entry: Mapping[str, Any]) -> DumpedFeature:
    statistics, logits = entry.get("statistics") or {}, entry.get("logit_effects") or {}
    texts = [
        _paper_text(each, str(group.get("quantile_name", "Samples"))[:200])
        for group in entry["examples_quantiles"]
        for each in group["examples"]
    ]
    sides = [
        _weights([pair[0] for pair in logits.get(side) or []], [pair[1] for pair in logits.get(side) or []], side)
        for side in ("positives", "negatives")
    ]
    return DumpedFeature(
        feature=_feature_number(entry["index"]),
        texts=texts,
        density=_number_or_nan(statistics.get("density_frac"), "density_frac"),
        max=_number_or_nan(statistics.get("global_max_act"), "global_max_act"),
        acts=_between(entry, "act_buckets", "act_bucket_edges"),
        logits=_between(entry, "logit_buckets", "logit_bucket_edges"),
        raises=sides[0],
        lowers=sides[1],
        neurons=_neurons(statistics.get("abs_max_neuron_inds"), statistics.get("abs_max_neuron_weights")),
    )


def _paper_text(entry: Mapping[str, Any], group: str) -> Text:
    tokens = _tokens(entry["tokens_str_list"])
    acts = _numbers(entry["tokens_acts_list"], "tokens_acts_list", len(tokens))
    loss = (entry.get("ablations") or {}).get("loss_ablation")
    measured = None if loss is None else _numbers(loss, "loss_ablation", len(tokens))
    return Text(group, tokens, acts, _hit(acts, entry.get("train_token_ind")), measured)


def _between(entry: Mapping[str, Any], counts: str, edges: str) -> Histogram | None:
    """A histogram given by the edges of its bars (or only their left ones)."""
    heights, bounds = entry.get(counts) or [], entry.get(edges) or []
    if not len(heights) or not len(bounds):
        return None
    tall, at = _numbers(heights, counts, len(heights)), _numbers(bounds, edges, len(bounds))
    if len(at) == len(tall) and len(at) > 1:
        at = np.append(at, 2 * at[-1] - at[-2])
    if len(at) != len(tall) + 1 or (np.diff(at) < 0).any():
        raise ValueError(f"{edges} are not the {len(tall) + 1} ascending edges of {counts}")
    return Histogram(tall, at)


# --- single values, of any type in the file ---------------------------------------------------------------------------


def token_bytes(text: str) -> bytes:
    r"""The bytes of a token string: UTF-8, with a byte written as text (`\x9c`, from `\x80` on) as that byte."""
    parts, last = [], 0
    for found in ESCAPED.finditer(text):
        parts += [
            text[last : found.start()].encode("utf-8", "surrogatepass"),
            bytes.fromhex(found[0].replace("\\x", "")),
        ]
        last = found.end()
    return b"".join([*parts, text[last:].encode("utf-8", "surrogatepass")])


def _tokens(found: Any) -> list[bytes]:
    if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
        raise ValueError("the tokens must be a list of strings")
    if not 1 <= len(found) <= MAX_TEXT:
        raise ValueError(f"a text has {len(found):,} tokens; 1 to {MAX_TEXT:,} are allowed")
    return [token_bytes(token) for token in found]


def _numbers(found: Any, name: str, length: int) -> np.ndarray:
    values = np.array(found, np.float64)
    if values.shape != (length,) or not np.isfinite(values).all():
        raise ValueError(f"{name} must be {length:,} finite numbers")
    return values


def _number_or_nan(found: Any, name: str) -> float:
    if found is None:
        return float("nan")
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{name} must be a number")
    return float(found)


def _feature_number(found: Any) -> int:
    number = int(found) if isinstance(found, str) and found.isascii() and found.isdecimal() else found
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < MAX_FEATURES:
        raise ValueError(f"its number must be an integer from 0 to {MAX_FEATURES - 1:,}")
    return number


def _hit(acts: np.ndarray, asked: Any) -> int:
    """The position that a text was chosen for; the strongest one if the file names none that fires."""
    known = isinstance(asked, int) and not isinstance(asked, bool) and 0 <= asked < len(acts)
    return int(asked) if known and (acts[asked] > 0 or not (acts > 0).any()) else int(acts.argmax())


def _weights(tokens: Any, values: Any, name: str) -> list[tuple[bytes, float]]:
    if not tokens:
        return []
    weights = _numbers(values, name, len(tokens)).tolist()
    return list(zip(_tokens(list(tokens)), weights, strict=True))


def _neurons(ids: Any, weights: Any) -> list[tuple[int, float]]:
    if not ids or not weights:
        return []
    if not isinstance(ids, Sequence) or not all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids):
        raise ValueError("the numbers of the neurons must be integers")
    return list(zip(ids, _numbers(weights, "neuron weights", len(ids)).tolist(), strict=True))


READERS: dict[str, Callable[[Mapping[str, Any]], DumpedFeature]] = {"sae-dashboard": _dashboard, "paper": _paper}
EXPECTED = {
    "sae-dashboard": "a SAEDashboard batch ({features: [{feature_index, activations, …}]}) or a Neuronpedia feature "
    "({index, activations, …})",
    "paper": "a feature of the paper's page ({index, examples_quantiles, statistics, logit_effects, …})",
}
