"""`sae steer`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sae.cli.flags import MODEL, add_device, add_verb

if TYPE_CHECKING:
    from sae.interventions.edits import Edit, Erasure
    from sae.interventions.steering import NextTokens, Steered


def steer(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "steer",
        _run_steer,
        "generate text with features changed, next to the same text unchanged",
        example='sae steer runs/a/first --feature 12 --set 5x --prompt "The"',
    )
    verb.add_argument("sae", metavar="DICTIONARY", help="directory of the dictionary")
    verb.add_argument(
        "--feature",
        type=int,
        action="append",
        metavar="N",
        help="number of the feature to change, at every position but BOS and what the dictionary's row filter leaves "
        "out; may be repeated",
    )
    verb.add_argument("--set", action="append", metavar="5x", help="set its activation to this multiple of its maximum")
    verb.add_argument("--add", action="append", metavar="2x", help="add this multiple of its maximum to its activation")
    verb.add_argument("--scale", action="append", metavar="0.5x", help="multiply its activation by this factor")
    verb.add_argument("--ablate", action="store_true", help="set its activation to zero")
    verb.add_argument(
        "--edit",
        action="append",
        metavar="FEATURE:MODE[:VALUE][:p99][:active]",
        help="one change written as one word: 12:set:5, 7:ablate, 9:add:2:p99 (in multiples of the 99th percentile "
        "instead of the maximum), 3:scale:0:active (only where the feature is active); erase:CONCEPT erases what `sae "
        "lens erase` found on this dictionary, erase:CONCEPT:random a random subspace of equal rank; may be repeated",
    )
    verb.add_argument("--prompt", default="", help="text to continue")
    verb.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt as a user's message in the model's own chat format; the model writes the reply",
    )
    verb.add_argument(
        "--special-tokens",
        action="store_true",
        help="read special tokens in the prompt as such, e.g. <|im_start|> as one token, instead of spelling them out",
    )
    verb.add_argument(
        "--pinned",
        action="store_true",
        help="as in Towards Monosemanticity: the prompt is 1,2,…,10 and features are set to 1x",
    )
    verb.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="number of tokens to generate")
    verb.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="of sampling; 0 always takes the likeliest token"
    )
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampling, the same for all texts")
    verb.add_argument(
        "--sweep", metavar="0,1,2,5,10", help="generate one text for each of these factors on the changes' values"
    )
    verb.add_argument("--model", help=f"{MODEL} (default: the model it was trained on)")
    add_device(verb)
    verb.add_argument("--json", action="store_true", help="print texts and measurements as JSON")


def _run_steer(args: argparse.Namespace) -> int:
    from sae import pipeline
    from sae.interventions.steering import PINNED_PROMPT, Generation, next_tokens, sweep_stream
    from sae.text.tokenizer import token_name

    edits, factors = _edits(args), _factors(args.sweep)
    written = PINNED_PROMPT if args.pinned else args.prompt
    prompt = [{"role": "user", "content": written}] if args.chat else written
    dictionary, model = pipeline.open_pair(args.sae, args.model, device=args.device)
    units: dict[str, Any] = dict(pipeline.feature_units(args.sae))
    generation = Generation(args.seed, args.max_new_tokens, args.temperature)
    *_, rows = sweep_stream(
        model, dictionary, prompt, edits, factors, generation, **units, special_tokens=args.special_tokens
    )
    following = next_tokens(model, dictionary, rows[0].prompt_ids, edits, **units)
    if args.json:
        print(json.dumps(_report(edits, factors, rows, following, partial(token_name, model.tokenizer)), indent=2))
        return 0
    print(f"base     {rows[0].prompt_text + rows[0].base_text!r}")
    for factor, row in zip(factors, rows, strict=True):
        name = "steered " if args.sweep is None else f"×{factor:<7g}"
        print(f"{name} {row.prompt_text + row.steered_text!r}")
        print(f"{'':9}{_measured(row)}")
    return 0


def _measured(row: Steered) -> str:
    first = row.first_divergence
    differ = "the texts never differ" if first is None else f"the texts differ from new token {first} on"
    return (
        f"{differ}; KL(steered ‖ base) {sum(row.kl) / len(row.kl):.3f} nats per token; perplexity under the base model "
        f"{row.steered_perplexity:.1f} (base text: {row.base_perplexity:.1f})"
    )


def _report(
    edits: Sequence[Edit | Erasure],
    factors: Sequence[float],
    rows: Sequence[Steered],
    following: NextTokens,
    token: Any,
) -> dict[str, Any]:
    base = rows[0]
    return {
        "edits": [str(edit) for edit in edits],
        "prompt_ids": base.prompt_ids,
        "prompt_text": base.prompt_text,
        "base": {"ids": base.base_ids, "text": base.base_text, "surprisal_nats": base.base_surprisal},
        "steered": [
            {
                "factor": factor,
                "ids": row.steered_ids,
                "text": row.steered_text,
                "kl_nats": row.kl,
                "surprisal_nats": row.steered_surprisal,
                "perplexity": row.steered_perplexity,
                "first_divergence": row.first_divergence,
            }
            for factor, row in zip(factors, rows, strict=True)
        ],
        "next_tokens": [
            {"id": i, "token": token(i), "base": p, "steered": q}
            for i, p, q in zip(following.ids, following.base, following.steered, strict=True)
        ],
    }


def _written(dictionary: str, text: str) -> Edit | Erasure:
    """One --edit: of a feature, or `erase:CONCEPT[:random]` by a result of `sae lens erase` on the dictionary."""
    from sae import pipeline
    from sae.interventions.edits import Edit, erased_concept

    if (erased := erased_concept(text)) is None:
        return Edit.parse(text)
    concept, is_control = erased
    return pipeline.erasure(dictionary, concept, control=is_control)


def _edits(args: argparse.Namespace) -> list[Edit | Erasure]:
    """An edit for each --feature (a flag such as --set is given once for all of them or once for each), then --edit."""
    from sae.interventions.edits import Edit

    written = [_written(args.sae, text) for text in args.edit or []]
    given = {mode: getattr(args, mode) for mode in ("set", "add", "scale") if getattr(args, mode)}
    if args.pinned and args.feature and not given:
        given = {"set": ["1x"]}
    if written and not args.feature and not given and not args.ablate:
        return written
    if not args.feature or len(given) + args.ablate != 1:
        raise ValueError(
            "name the features and what to do with them: --feature N with one of --set 5x, --add 2x, --scale 0.5x or "
            "--ablate; or --edit N:set:5."
        )
    if args.ablate:
        return [*(Edit(feature, "ablate") for feature in args.feature), *written]
    ((mode, values),) = given.items()
    if len(values) == 1:
        values = values * len(args.feature)
    if len(values) != len(args.feature):
        raise ValueError(
            f"--{mode} is given {len(values)} times for {len(args.feature)} features: give it once, or once for each."
        )
    return [*(Edit(f, mode, _multiple(v)) for f, v in zip(args.feature, values, strict=True)), *written]


def _multiple(text: str) -> float:
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise ValueError(f"expected a multiple such as 5x, got {text!r}.") from None


def _factors(text: str | None) -> list[float]:
    return [1.0] if text is None else [_multiple(part.strip()) for part in text.split(",")]
