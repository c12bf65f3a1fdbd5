"""How early the prediction is there: the residual stream of each depth read as if it were the last one.

Logit lens: the final norm and W_U applied to the stream after each block (nostalgebraist 2020, "interpreting GPT: the
logit lens"). Tuned lens: an affine map for each depth before it, trained to minimise KL(final ‖ lens) (Belrose et al.
2023, arXiv 2303.08112).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.circuits.intervals import Z, ratio_of_means
from sae.circuits.results import Control, Measure
from sae.circuits.text import Contexts
from sae.circuits.unembedding import Unembedding, unembedding_of
from sae.dictionary.autoencoder import SAE
from sae.lm import LanguageModel

LOGITS_AT_ONCE = 1 << 23
KL = "mean over tokens of KL(p_final ‖ p_lens) = Σ p_final (log p_final − log p_lens), nats"
RANK = "mean over tokens of the number of tokens that the lens finds likelier than the true next token"
SHUFFLED = "the same residual vectors, dealt to other positions of the text at random"
BIAS = "a tuned lens of which only the bias is trained, for as many steps"
OTHER = "the tuned lens of the next depth (of the first for the last one) applied to this depth"


@dataclass(frozen=True)
class Tuning:
    """How the tuned lens is trained: `steps` of Adam on `batch_tokens` tokens, the rate falling linearly to 0."""

    steps: int = 250
    batch_tokens: int = 256
    lr: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Translator:
    """`h + h @ weight + bias`: an affine map of the residual stream, the identity before training."""

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return resid + resid @ self.weight + self.bias


@dataclass(frozen=True, eq=False)
class Readings:
    """What the lenses say of each predicted token of the held-out text; rows are tokens in the order of the text.

    `maps` are those of the tuned lens, one for each depth.
    """

    names: list[str]  # of the depths
    kl: Float[Tensor, "token depth"]  # of the logit lens
    rank: Float[Tensor, "token depth"]
    maps: list[Translator]


def depths_of(model: LanguageModel) -> list[str]:
    """The hook points of the depths: the stream that enters the first block, and after each block."""
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers))]


def layer_depth(
    model: LanguageModel, train: Contexts, held_out: Contexts, tuning: Tuning
) -> tuple[dict[str, Measure], Readings]:
    """KL and rank of both lenses at each depth, on the held-out contexts, and what the logit lens says of each token.

    Raises: NoLinearPath, ModelError for a model whose logits do not follow from the stream by a norm and W_U.
    """
    unembedding = unembedding_of(model, held_out.tokens)
    streams, targets, context = _streams(model, held_out)
    training, _, _ = _streams(model, train)
    generator = torch.Generator().manual_seed(tuning.seed)
    tuned, biased = (
        [_train_translator(unembedding, training[i], training[-1], tuning, bias_only=b) for i in range(len(training))]
        for b in (False, True)
    )
    shuffled = torch.randperm(len(targets), generator=generator)
    after = [*range(1, len(streams)), 0]

    def read(maps: list[Translator] | None, *, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = [stream if rows is None else stream[rows] for stream in streams]
        mapped = inputs if maps is None else [m(x) for m, x in zip(maps, inputs, strict=True)]
        columns = [_compare(unembedding, x, streams[-1], targets) for x in mapped]
        kl, rank = (torch.stack(column, -1) for column in zip(*columns, strict=True))
        return kl, rank

    logit, tuned_read = read(None), read(tuned)
    controls = {
        "logit": {"shuffled_rows": (SHUFFLED, read(None, rows=shuffled))},
        "tuned": {
            "bias_only": (BIAS, read(biased)),
            "other_depth": (OTHER, read([tuned[i] for i in after])),
            "shuffled_rows": (SHUFFLED, read(tuned, rows=shuffled)),
        },
    }
    measures = {}
    for lens, found in (("logit", logit), ("tuned", tuned_read)):
        for place, (name, formula) in enumerate((("kl", KL), ("rank", RANK))):
            measures[f"{name}_{lens}_lens"] = Measure(
                found[place].mean(0),
                len(targets),
                "tokens",
                formula,
                {
                    kind: Control(each[place].mean(0), what, _over_contexts(each[place], context))
                    for kind, (what, each) in controls[lens].items()
                },
                _over_contexts(found[place], context),
                ("depth",),
            )
    return measures, Readings(depths_of(model), *logit, tuned)


@torch.no_grad()
def feature_depth(
    model: LanguageModel, sae: SAE, hook_point: str, held_out: Contexts, readings: Readings, *, seed: int = 0
) -> dict[str, Measure]:
    """KL and rank of the logit lens at each depth over the tokens on which a feature fires; NaN if it never does."""
    mask = held_out.predicted
    firing = torch.cat(
        [
            (sae.encode(model.capture(part, hook_point)[here.to(model.device)]) > 0).cpu()
            for part, here in zip(torch.split(held_out.tokens, 8), torch.split(mask, 8), strict=True)
        ]
    )
    shuffled = torch.randperm(len(firing), generator=torch.Generator().manual_seed(seed))
    what = "the feature's firings dealt to other tokens at random: the same number of tokens, chosen blindly"
    counts = firing.sum(0)
    measures = {}
    for name, formula, values in (("kl", KL, readings.kl), ("rank", RANK, readings.rank)):
        control, control_ci = _mean_where(firing, values[shuffled])
        mean, interval = _mean_where(firing, values)
        measures[f"{name}_by_feature"] = Measure(
            mean,
            int(counts.max()),
            "tokens of the feature that fires most",
            f"{formula}; over the tokens on which the feature fires",
            {"shuffled_firings": Control(control, what, control_ci)},
            interval,
            ("feature", "depth"),
        )
    return measures


def _mean_where(
    firing: Bool[Tensor, "token d_sae"], values: Float[Tensor, "token depth"]
) -> tuple[Float[Tensor, "d_sae depth"], tuple[Float[Tensor, "d_sae depth"], Float[Tensor, "d_sae depth"]]]:
    """Mean of the values over each feature's tokens, ± 1.96 standard errors."""
    count = firing.sum(0)[:, None].double()
    wanted = values.double()
    blocks = [part.T.double() for part in torch.split(firing, 1024, 1)]
    mean = torch.cat([block @ wanted for block in blocks]) / count
    squares = torch.cat([block @ wanted.square() for block in blocks])
    variance = (squares - count * mean.square()) / (count - 1)
    half = Z * (variance.clamp_min(0) / count).sqrt()
    return mean.float(), ((mean - half).float(), (mean + half).float())


@torch.no_grad()
def _streams(
    model: LanguageModel, contexts: Contexts
) -> tuple[list[Float[Tensor, "token d_model"]], Int[Tensor, " token"], Int[Tensor, " token"]]:
    """The stream of each depth where the next token is part of the text, that token, and the number of its context."""
    mask, hooks = contexts.predicted, depths_of(model)
    parts: list[list[Tensor]] = [[] for _ in hooks]
    for tokens, here in zip(torch.split(contexts.tokens, 8), torch.split(mask, 8), strict=True):
        caught = model.capture_all(tokens, hooks)
        for part, hook in zip(parts, hooks, strict=True):
            part.append(caught[hook][here.to(model.device)].clone())
    targets = contexts.tokens[:, 1:][mask[:, :-1]].to(model.device)
    context = mask.nonzero()[:, 0]
    with torch.inference_mode(False):  # so that training may use them
        return [torch.cat(part).clone() for part in parts], targets, context


@torch.no_grad()
def _compare(
    unembedding: Unembedding,
    stream: Float[Tensor, "token d_model"],
    final: Float[Tensor, "token d_model"],
    targets: Int[Tensor, " token"],
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """KL(p_final ‖ p_lens) of each token, and the rank of the true one."""
    kls, ranks = [], []
    size = max(1, LOGITS_AT_ONCE // unembedding.constant.numel())
    for x, last, target in zip(*(torch.split(each, size) for each in (stream, final, targets)), strict=True):
        seen = unembedding.log_p(x)
        kls.append(_kl(unembedding.log_p(last), seen))
        ranks.append((seen > seen.gather(-1, target[:, None])).sum(-1).float())
    return torch.cat(kls).cpu(), torch.cat(ranks).cpu()


def _kl(log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """KL(p ‖ q) in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _train_translator(
    unembedding: Unembedding,
    stream: Float[Tensor, "token d_model"],
    final: Float[Tensor, "token d_model"],
    tuning: Tuning,
    *,
    bias_only: bool,
) -> Translator:
    """Minimises the mean KL(p_final ‖ p_lens) over training tokens."""
    width = stream.shape[-1]
    with torch.inference_mode(False), torch.enable_grad():
        made = Translator(*(torch.zeros(*shape, device=stream.device) for shape in ((width, width), (width,))))
        if torch.equal(stream, final):
            return made  # the last depth: the lens is the model
        trained = [made.bias] if bias_only else [made.weight, made.bias]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=tuning.lr)
        generator = torch.Generator().manual_seed(tuning.seed)
        for step in range(tuning.steps):
            rows = torch.randint(len(stream), (tuning.batch_tokens,), generator=generator).to(stream.device)
            optimizer.param_groups[0]["lr"] = tuning.lr * (1 - step / tuning.steps)
            loss = _kl(unembedding.log_p(final[rows]), unembedding.log_p(made(stream[rows]))).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return Translator(made.weight.detach(), made.bias.detach())


def _over_contexts(
    values: Float[Tensor, "token depth"], context: Int[Tensor, " token"]
) -> tuple[Float[Tensor, " depth"], Float[Tensor, " depth"]]:
    """Interval of the mean over tokens; contexts are the units, because tokens of one text are alike."""
    n = int(context.max()) + 1
    sums = torch.zeros(n, values.shape[1], dtype=torch.float64).index_add_(0, context, values.double())
    return ratio_of_means(sums, torch.bincount(context, minlength=n).double())[1]
