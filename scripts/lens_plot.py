"""Draws the measurements of the lenses as SVG files for the documentation, without a plotting library.

    python scripts/lens_plot.py docs/measurements/lenses.json --out docs/measurements

Controls are dashed. Sections that the file does not have are an error: a picture shows what was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from panels import Bar, Bars, Line, Panel, drawing

Sections = Mapping[str, Any]


def growth(sections: Sections) -> list[Panel]:
    """Two layers and one: prefix matching, the loss on a repeat, in-context learning, by tokens seen."""
    two, one = (sections[f"growth-attn-{n}l"]["figures"] for n in (2, 1))

    def line(name: str, found: Any, measure: str, control: str | None = None) -> Line:
        about = found["measures"][measure]
        values = about["value"] if control is None else about["controls"][control]["value"]
        millions = [tokens / 1e6 for tokens in found["labels"]["tokens"]]
        return Line(name, list(zip(millions, values, strict=True)), control is not None)

    def panel(title: str, measure: str, control: str, name: str) -> Panel:
        lines = [line("two layers", two, measure), line("one layer", one, measure)]
        return Panel(title, "million tokens seen", [*lines, line(f"two layers, {name}", two, measure, control)])

    return [
        panel("Best prefix score", "prefix_matching", "no_repeats", "no repeats"),
        panel("Loss of a repeat, nats", "repeat_loss", "first_copy", "first copy"),
        panel("Loss at token 244 − at 50, nats", "in_context_learning", "random_order", "shuffled text"),
    ]


def units(sections: Sections) -> list[Panel]:
    """The share that comes back with the largest units, by how many are patched together."""

    def panel(title: str, section: str, measure: str, x_axis: str) -> Panel:
        found = sections[section]["figures"]
        about, sizes = found["measures"][measure], found["labels"][f"units.{measure}"]
        columns = {"the largest": about["value"]}
        columns |= {
            name: about["controls"][control]["value"]
            for name, control in (
                ("chosen on other prompts", "chosen_on_other_prompts"),
                ("at random", "random_units"),
                ("random direction", "random_direction"),
            )
        }
        lines = [Line(name, list(zip(sizes, y, strict=True)), name != "the largest") for name, y in columns.items()]
        return Panel(title, x_axis, lines, powers_of_2=True)

    return [
        panel(
            "Induction, attn-2l: share restored",
            "induction-attn-2l-activation-feature",
            "restoring_feature.together",
            "features patched",
        ),
        panel(
            "Agreement, tiny-relu-1l: share restored",
            "agreement-tiny-relu-1l-neuron",
            "restoring_L0.neuron.together",
            "neurons patched",
        ),
        panel(
            "Agreement, tiny-relu-1l: share restored",
            "agreement-tiny-relu-1l-feature",
            "restoring_feature.together",
            "features patched",
        ),
    ]


def heads(sections: Sections) -> list[Bars]:
    """Two measures of each head of both attention-only models, beside their controls."""
    found = {name: sections[f"heads-attn-{name}"]["figures"]["measures"] for name in ("2l", "1l")}

    def bars(title: str, measure: str, control: str, said: str) -> Bars:
        rows = [
            Bar(f"attn-{name} head {layer}.{head}", value, control=about["controls"][control]["value"][layer][head])
            for name, about in ((name, measures[measure]) for name, measures in found.items())
            for layer, values in enumerate(about["value"])
            for head, value in enumerate(values)
        ]
        return Bars(title, f"mean attention; dashed: {said}", rows)

    return [
        bars("Attention to the token before", "previous_token", "shuffled_weights", "shuffled weights"),
        bars("Prefix matching", "prefix_matching", "no_repeats", "no repeats"),
    ]


def control_bars(about: Mapping[str, Any], names: Mapping[str, str], place: int | None = None) -> list[Bar]:
    """A measure's controls, by their names in the results; of an array the value at `place`."""
    values = {said: about["controls"][name]["value"] for name, said in names.items()}
    return [Bar(said, value if place is None else value[place], True) for said, value in values.items()]


def depth(sections: Sections) -> list[Bars]:
    """KL of the lenses at the depths before the last one."""

    def bars(name: str, place: int, said: str) -> Bars:
        measures = sections[f"depth-{name}"]["figures"]["measures"]
        logit, tuned = measures["kl_logit_lens"], measures["kl_tuned_lens"]
        rows = [Bar("logit lens", logit["value"][place]), Bar("tuned lens", tuned["value"][place])]
        names = ("bias_only", "other_depth", "shuffled_rows")
        rows += control_bars(tuned, {name: f"tuned, {name.replace('_', ' ')}" for name in names}, place)
        rows += control_bars(logit, {"shuffled_rows": "logit, shuffled rows"}, place)
        return Bars(f"{name}, {said}", "KL(final ‖ lens), nats", rows)

    return [bars("attn-2l", 0, "embedding"), bars("attn-2l", 1, "after layer 0"), bars("tiny-relu-1l", 0, "embedding")]


def erase(sections: Sections) -> list[Bars]:
    """What each edit does to a probe, and what it costs on the concept and elsewhere."""
    measures = sections["erase-latex"]["figures"]["measures"]
    edits = {
        "random_subspace": "random subspace",
        "features_1": "best feature",
        "features_10": "10 best features",
        "features_50": "50 best features",
    }

    def bars(title: str, measure: str, x_axis: str, *, before: bool = False) -> Bars:
        about = measures[measure]
        names = ({"before": "no edit"} if before else {}) | edits
        return Bars(title, x_axis, [Bar("LEACE", about["value"]), *control_bars(about, names)])

    return [
        bars("Probe of LaTeX after the edit", "probe_accuracy", "held-out accuracy, chance 0.5", before=True),
        bars("Cost on LaTeX", "delta_loss_concept", "Δloss, nats"),
        bars("Cost elsewhere", "delta_loss_others", "Δloss, nats"),
    ]


def keys(sections: Sections) -> list[Bars]:
    """Units that say which token came before, and what induction heads read of them."""
    measures = sections["keys-attn-2l"]["figures"]["measures"]
    populations = {
        "shuffled_model": "shuffled model",
        "components": "components",
        "head_dimensions": "head dimensions",
        "random_dictionary": "random directions",
        "current_token": "rule: current token",
        "shuffled_labels": "shuffled labels",
    }
    ruled = measures["units_with_rule"]
    first = [Bar("features", ruled["value"]), *control_bars(ruled, populations)]

    def of_head(head: int) -> Bars:
        about = measures["share_of_score"]
        names = {name: said for name, said in populations.items() if name in about["controls"]}
        rows = [Bar("features", about["value"][head])]
        rows += control_bars(about, {"shuffled_rules": "shuffled rules"} | names, head)
        return Bars(f"Score of head 1.{head}", "share through units about the token before", rows)

    return [Bars("Rule “the token before is X”", "share of units with F1 ≥ 0.5", first), of_head(1), of_head(3)]


def patched(sections: Sections) -> list[Bars]:
    """Head by head, both directions of patching on induction."""
    found = sections["induction-attn-2l-activation-head"]["figures"]

    def bars(title: str, measure: str, x_axis: str) -> Bars:
        about, names = found["measures"][measure], found["labels"][f"site.{measure}"]
        random = about["controls"]["random_direction"]["value"]
        rows = [
            Bar(name.replace("L", "head ").replace(".head", ""), value[0], control=blind[0])
            for name, value, blind in zip(names, about["value"], random, strict=True)
        ]
        return Bars(title, f"{x_axis}; dashed: random direction", rows)

    return [
        bars("Induction: clean into corrupt", "restoring_head", "share restored"),
        bars("Induction: corrupt into clean", "breaking_head", "share left"),
    ]


def tracing(sections: Sections) -> list[Panel]:
    """What restoring an MLP's output brings back, by layer: the model as it was trained, the planted one, its twin."""

    def line(name: str, section: str, place: str, control: str | None = None) -> Line:
        found = sections[section]["figures"]
        about = found["measures"]["restored_mlp_out"]
        grid = about["value"] if control is None else about["controls"][control]["value"]
        column = found["labels"]["place"].index(place)
        return Line(name, [(layer, row[column]) for layer, row in enumerate(grid)], control is not None)

    def panel(title: str, method: str, place: str) -> Panel:
        planted = f"facts-{method}-planted"
        lines = [line("planted", planted, place), line("its twin", f"facts-{method}-twin", place)]
        lines.append(line("tasks-4l", f"facts-{method}-tasks-4l", place))
        return Panel(title, "layer of the MLP", [*lines, line("planted, random", planted, place, "random_direction")])

    return [
        panel("P restored at the subject's last token, swap", "swap", "subject_last"),
        panel("P restored at the subject's last token, noise", "gaussian", "subject_last"),
        panel("P restored at the end, swap", "swap", "end"),
    ]


DRAWINGS: dict[str, Callable[[Sections], Sequence[Panel | Bars]]] = {
    "lens-depth.svg": depth,
    "lens-erase.svg": erase,
    "lens-growth.svg": growth,
    "lens-heads.svg": heads,
    "lens-keys.svg": keys,
    "lens-patching.svg": patched,
    "lens-tracing.svg": tracing,
    "lens-units.svg": units,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", type=Path, help="file that scripts/lens_figures.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory of the drawings")
    args = parser.parse_args()
    sections = json.loads(args.measurements.read_text(encoding="utf-8"))
    for name, panels in DRAWINGS.items():
        (args.out / name).write_text(drawing(panels(sections)), encoding="utf-8")
        print(args.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
