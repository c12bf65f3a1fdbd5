"""Parts of the documentation that are generated from the code each time the site is built.

A page says where: `<!-- generated: command line -->` and so on, see PARTS.
"""

from __future__ import annotations

import argparse
import html
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

EMPTY = (None, False, argparse.SUPPRESS, [], "")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for every page."""
    for name, part in PARTS.items():
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, part())
    return markdown


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Every verb of the `sae` command with its parser."""
    from sae.cli import build_parser

    actions = build_parser()._actions
    (found,) = (action for action in actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def arguments(verb: argparse.ArgumentParser) -> list[argparse.Action]:
    """A verb's arguments, without --help and the old names of renamed flags."""
    return [a for a in verb._actions if not isinstance(a, argparse._HelpAction) and a.help != argparse.SUPPRESS]


def command_line() -> str:
    """One section per verb: what it does, its usage and a table of its arguments."""
    return "\n".join(line for name, verb in verbs().items() for line in _verb(name, verb))


def _verb(name: str, verb: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## sae {name}\n"
    description = (verb.description or "").rstrip(".")
    yield f"{description[:1].upper()}{description[1:]}.\n"
    yield f"```text\n{verb.format_usage().removeprefix('usage: ').rstrip()}\n```\n"
    yield "| argument | default | meaning |\n|---|---|---|"
    for action in arguments(verb):
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.dest}`"
        if action.option_strings and action.nargs != 0:
            names += f" {html.escape(_value(action))}"
        yield f"| {names} | {_default(action)} | {_cell(action)} |"
    yield ""


def _value(action: argparse.Action) -> str:
    if action.choices:
        return " or ".join(str(choice) for choice in action.choices)
    return str(action.metavar or action.dest.upper())


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    return "" if action.default in EMPTY else f"`{action.default}`"


def _cell(action: argparse.Action) -> str:
    return html.escape((action.help or "").replace("%%", "%")).replace("|", "\\|")


def metrics() -> str:
    """Every metric that is a ratio of sums over tokens, as the code defines it."""
    from sae.evaluation.metrics import METRICS

    lines = ["| metric | formula | version | trap |", "|---|---|---:|---|"]
    lines += [f"| `{name}` | {m.formula} | {m.version} | {m.trap} |" for name, m in METRICS.items()]
    return "\n".join(lines)


def crosscoder_metrics() -> str:
    """The metrics of a crosscoder: of all sites, and those that have the suffix of a site or of a model."""
    from sae.evaluation.crosscoder import OF_LOSSES, OF_ROWS, WHOLE
    from sae.evaluation.metrics import METRICS

    lines = ["| metric | formula | version | trap |", "|---|---|---:|---|"]
    lines += [f"| `{name}` | {m.formula} | {m.version} | {m.trap} |" for name, m in WHOLE.items()]
    for names, places in ((OF_ROWS, "`_site_n`"), (OF_LOSSES, "`_site_n`, `_model_n`")):
        for name in names:
            metric = METRICS[name]
            lines.append(f"| `{name}` with {places} | {metric.formula} | {metric.version} | {metric.trap} |")
    return "\n".join(lines)


def recipe_settings() -> str:
    """What each recipe sets, and which optional settings it takes besides."""
    from sae.training.recipes import RECIPES

    lines = ["| recipe | what it sets | also takes |", "|---|---|---|"]
    for name, recipe in RECIPES.items():
        given = ", ".join(f"`{key}={_short(value)}`" for key, value in recipe.defaults.items())
        others = ", ".join(f"`{key}`" for key in sorted(recipe.settings - set(recipe.defaults)))
        lines.append(f"| `{name}` | {given} | {others} |")
    return "\n".join(lines)


# Of settings that the source does not explain by a comment at the end of their line.
MEANINGS = {
    "beta1": "Adam's momentum",
    "d_sae": "number of features",
    "decay_share": "last part of the run, in which the learning rate falls to 0",
    "k": "active features per token",
    "l0_penalty": "λ of a penalty on L0 itself",
    "l1": "λ of Σ f, in scaled units",
    "lr": "peak learning rate",
    "recipe": "name of the recipe",
    "resample_shares": "when dead features are resampled",
    "seed": "of initialisation and row order",
    "target_l0": "active features per token to aim for (`--l0`)",
    "threshold_init": "first value of the thresholds",
    "warmup_share": "first part of the run, in which the learning rate rises from 0",
}


def settings() -> str:
    """Every setting of training: its default, the values it may take, and what it means."""
    from sae.training.config import TrainConfig

    lines = ["| setting | default | range | meaning |", "|---|---|---|---|"]
    comments = {
        found[1]: found[2]
        for owner in TrainConfig.__mro__[:-1]
        for found in re.finditer(r"^    (\w+): .*?  # (.+)$", inspect.getsource(owner), re.M)
    }
    for each in sorted(fields(TrainConfig), key=lambda each: each.name):
        check = each.metadata.get("check")
        rule = check.rule if check else ""
        lines.append(
            f"| `{each.name}` | `{_short(each.default)}` | {rule} | {comments.get(each.name) or MEANINGS[each.name]} |"
        )
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(_short(each) for each in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


VERBS_FIRST = (
    "harvest",
    "train",
    "Live",
    "Sites",
    "sweep",
    "evaluate",
    "index",
    "search",
    "compare",
    "controls",
    "export",
    "import_dictionary",
)


def pipeline_names() -> str:
    """The functions and classes of `sae.pipeline`, the verbs first, as mkdocstrings wants them."""
    from sae import pipeline

    return _documented(pipeline, [*VERBS_FIRST, *(name for name in pipeline.__all__ if name not in VERBS_FIRST)])


def public_objects() -> str:
    """The public names of `sae` that are not in `sae.pipeline`."""
    import sae
    from sae import pipeline

    return _documented(sae, [name for name in sae.__all__ if name not in pipeline.__all__])


def _documented(package: Any, names: Iterable[str]) -> str:
    """`::: module.name` for each function or class, wherever it is defined, under its public name."""
    found = {name: getattr(package, name) for name in names}
    return "\n\n".join(
        f"::: {o.__module__}.{o.__qualname__}\n    options: {{heading: {name}, toc_label: {name}}}"
        for name, o in found.items()
        if callable(o)
    )


PARTS = {
    "command line": command_line,
    "metrics": metrics,
    "crosscoder metrics": crosscoder_metrics,
    "recipe settings": recipe_settings,
    "settings": settings,
    "pipeline": pipeline_names,
    "objects": public_objects,
}
