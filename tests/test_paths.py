"""Linear paths to the logits in each family, against a numerical derivative of `transformers`' own forward pass.

The truth is a plain `transformers` model in float64. Only what the definition holds fixed is held: the scale σ of the
final norm and of a norm after the sublayer, and, for the direct path, the outputs of the other sublayers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import random_sae
from torch import Tensor

from sae.circuits.attention_paths import paths
from sae.dictionary.directions import head_shares
from sae.interventions.attribution import attribute
from sae.lm import BridgeModel, ModelError, NoLinearPath, load_model

D_VOCAB, WIDTH, BOTH = 300, 16, {"num_attention_heads": 2, "num_key_value_heads": 2}
GEMMA = {"head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name in the docs → class, settings
    "GPT-2": ("GPT2", {}),
    "Llama": ("Llama", {}),
    "Mistral": ("Mistral", {}),
    "Qwen 2": ("Qwen2", {}),
    "Qwen 3": ("Qwen3", {"head_dim": 16}),
    "Gemma 1": ("Gemma", GEMMA),
    "Gemma 2": ("Gemma2", GEMMA),
    "Gemma 3": ("Gemma3Text", GEMMA),
    "GPT-NeoX, Pythia": ("GPTNeoX", BOTH),
    "Phi": ("Phi", BOTH),
    "OLMo 2": ("Olmo2", {}),
    "Mixtral": ("Mixtral", {"num_local_experts": 2}),
    "Granite": (
        "Granite",
        {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.5},
    ),
    "Cohere": ("Cohere", {"logit_scale": 0.25}),
}
DIRECT = (
    "blocks.0.hook_resid_pre",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.mlp.hook_post",
    "blocks.0.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "blocks.1.mlp.hook_post",
    "blocks.1.hook_resid_post",
)
EXACT = ("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post")


def which(hook_point: str) -> str:
    return "attn" if "attn" in hook_point else "mlp"


@dataclass
class Case:
    """One family: plain transformers in float64, and the same weights opened by us."""

    name: str
    plain: Any
    opened: BridgeModel
    directory: Path

    @property
    def blocks(self) -> Any:
        body = self.plain.base_model
        return body.h if hasattr(body, "h") else body.layers

    @property
    def final_norm(self) -> Any:
        body = self.plain.base_model
        names = ("ln_f", "norm", "final_layer_norm", "final_layernorm")
        return next(getattr(body, name) for name in names if hasattr(body, name))

    def sublayer(self, layer: int, part: str) -> Any:
        names = ("attn", "self_attn", "attention") if part == "attn" else ("mlp", "block_sparse_moe")
        return next(getattr(self.blocks[layer], name) for name in names if hasattr(self.blocks[layer], name))

    def norm_after(self, layer: int, part: str) -> Any:
        """The norm between a sublayer and the stream, in Gemma 2 and 3 and OLMo 2."""
        if self.name not in ("Gemma 2", "Gemma 3", "OLMo 2"):
            return None
        name = "post_attention_layernorm" if part == "attn" else "post_feedforward_layernorm"
        return getattr(self.blocks[layer], name)

    def place(self, hook_point: str) -> tuple[Any, bool]:
        """The module of plain transformers, and whether the hook point is its output (else its input)."""
        layer, name = int(hook_point.split(".")[1]), hook_point.split(".", 2)[2]
        if name in ("hook_resid_pre", "hook_resid_post"):
            return self.blocks[layer], name == "hook_resid_post"
        part = which(name)
        if name in ("hook_attn_out", "hook_mlp_out") or (self.name == "Mixtral" and part == "mlp"):
            return self.norm_after(layer, part) or self.sublayer(layer, part), True
        writers = ("c_proj", "o_proj", "dense") if part == "attn" else ("c_proj", "down_proj", "dense_4h_to_h", "fc2")
        owner = self.sublayer(layer, part)
        return next(getattr(owner, each) for each in writers if hasattr(owner, each)), False


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Case]:
    import transformers

    kind, settings = FAMILIES[request.param]
    sizes: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
    if kind != "GPT2":
        sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        sizes |= {"intermediate_size": 24, "max_position_embeddings": 32}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=None, **(sizes | settings)
    )
    extra = {"experts_implementation": "eager"} if kind == "Mixtral" else {}  # grouped products have no float64
    torch.manual_seed(3)
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **extra).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.25))
            if norm and name.endswith("weight") and "Gemma" not in kind:
                parameter.add_(1.0)  # Gemma's norms scale by 1 + w
    directory = tmp_path_factory.mktemp("family") / kind
    plain.save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_model_dir / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(directory)
    opened = load_model(directory)
    assert isinstance(opened, BridgeModel)
    return Case(request.param, plain.double().requires_grad_(False), opened, directory)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(1, D_VOCAB, (7,), generator=torch.Generator().manual_seed(1)).tolist()


# --- the truth: plain transformers in float64 -------------------------------------------------------------------------


@contextmanager
def replaced(module: Any, output: bool, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What leaves (or enters) a module of plain transformers, changed."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def after(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = (
        module.register_forward_hook(after) if output else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


def seen_at(case: Case, ids: list[int], module: Any, output: bool) -> Tensor:
    found: list[Tensor] = []
    with torch.no_grad(), replaced(module, output, lambda x: found.append(x.clone()) or x):
        case.plain(torch.tensor([ids]))
    return found[0]


def sigma(norm: Any, x: Tensor) -> Tensor:
    """σ of a norm at x, from its definition: RMSNorm does not subtract the mean."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    centred = isinstance(norm, torch.nn.LayerNorm) or "Cohere" in type(norm).__name__
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@contextmanager
def at_fixed_scale(case: Case, ids: list[int], norm: Any) -> Iterator[None]:
    """The module's own forward pass, times σ(x) / σ of the unchanged text, so that it is affine in x."""
    held = sigma(norm, seen_at(case, ids, norm, False))
    own, bias = norm.forward, getattr(norm, "bias", None)

    def forward(x: Tensor) -> Tensor:
        constant = 0 if bias is None else bias
        return (own(x) - constant) * sigma(norm, x) / held + constant

    norm.forward = forward
    try:
        yield
    finally:
        del norm.forward


@contextmanager
def definition(case: Case, ids: list[int], hook_point: str, *, only_direct: bool) -> Iterator[None]:
    """What the definition of the path holds fixed."""
    layer, own = int(hook_point.split(".")[1]), "" if "resid" in hook_point else which(hook_point)
    first = layer + 1 if hook_point.endswith("hook_resid_post") else layer
    others = [(at, part) for at in range(first, 2) for part in ("attn", "mlp") if (at, part) != (layer, own)]
    with ExitStack() as held:
        for at, part in others if only_direct else ():
            clean = seen_at(case, ids, case.sublayer(at, part), True)
            held.enter_context(replaced(case.sublayer(at, part), True, lambda _, clean=clean: clean))
        held.enter_context(at_fixed_scale(case, ids, case.final_norm))
        if own and (norm := case.norm_after(layer, own)) is not None:
            held.enter_context(at_fixed_scale(case, ids, norm))
        yield


def slope(case: Case, ids: list[int], hook_point: str, direction: Tensor) -> Tensor:
    """d logits / d activation along `direction`, both at the last position: a central difference under `definition`."""
    module, output = case.place(hook_point)
    step = 1.0  # the model is affine in x; norms of transformers compute in float32, whose rounding a small step shows

    def logits(sign: int) -> Tensor:
        def moved(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, -1] += sign * step * direction
            return x

        with torch.no_grad(), replaced(module, output, moved):
            found: Tensor = case.plain(torch.tensor([ids])).logits[0, -1]
            return found

    return (logits(1) - logits(-1)) / (2 * step)


@contextmanager
def without_soft_cap(case: Case) -> Iterator[None]:
    cap = getattr(case.plain.config, "final_logit_softcapping", None)
    if cap is not None:
        case.plain.config.final_logit_softcapping = None
    try:
        yield
    finally:
        if cap is not None:
            case.plain.config.final_logit_softcapping = cap


# --- what must hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook_point", DIRECT)
def test_logit_weights_are_the_derivative_of_the_models_own_logits(case: Case, ids: list[int], hook_point: str) -> None:
    if case.name == "Granite" and hook_point.endswith("_out"):
        pytest.skip("the hook point is the sublayer's output times a multiplier: no single module of transformers")
    width = case.opened.hook_width(hook_point)
    directions = torch.randn(2, width, generator=torch.Generator().manual_seed(2))
    said = case.opened.logit_weights(directions, hook_point)
    with without_soft_cap(case), definition(case, ids, hook_point, only_direct=True):
        scale = sigma(case.final_norm, seen_at(case, ids, case.final_norm, False))[0, -1]
        path = case.opened.direct_path(hook_point)
        if path.norm is not None:
            norm = case.norm_after(int(hook_point.split(".")[1]), which(hook_point))
            scale = scale * sigma(norm, seen_at(case, ids, norm, False))[0, -1]
        for direction, found in zip(directions.double(), said.double(), strict=True):
            expected = slope(case, ids, hook_point, direction) * scale
            expected = expected - expected.median()
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("hook_point", EXACT)
def test_exact_attribution_is_exact(case: Case, ids: list[int], hook_point: str) -> None:
    """Each part is a times the derivative, with nothing held but the scales that are named; the parts sum to the
    logit of the model before its soft cap."""
    if case.name == "Granite" and hook_point.endswith("_out"):
        pytest.skip("as above")
    token = 41
    sae = random_sae(case.opened.hook_width(hook_point), hook_point)
    found = attribute(case.opened, sae, ids, position=len(ids) - 1, token=token, hook_point=hook_point)
    assert found.exact
    assert len(found.held_fixed) == (2 if case.opened.direct_path(hook_point).norm else 1)
    assert (found.before_soft_cap is None) == (case.name != "Gemma 2")
    module, output = case.place(hook_point)
    x = seen_at(case, ids, module, output)[0, -1]
    acts = sae.encode(x.float()).double()
    with without_soft_cap(case), definition(case, ids, hook_point, only_direct=False):
        with torch.no_grad():
            logits = case.plain(torch.tensor([ids])).logits[0, -1]

        def push(direction: Tensor) -> float:
            moved = slope(case, ids, hook_point, direction.double())
            return float(moved[token] - moved.mean())

        scale = float(logits.abs().max())
        assert found.logit == pytest.approx(float(logits[token] - logits.mean()), abs=1e-5 * scale)
        assert found.features.tolist() == torch.nonzero(acts)[:, 0].tolist()
        for feature, by in list(zip(found.features.tolist(), found.by_feature.tolist(), strict=True))[:4]:
            assert by == pytest.approx(float(acts[feature]) * push(sae.W_dec[feature]), abs=1e-4 * scale, rel=1e-4)
        assert found.bias == pytest.approx(push(sae.b_dec), abs=1e-4 * scale)
        total = float(found.by_feature.double().sum()) + found.bias + found.unexplained
        assert total == pytest.approx(push(x), abs=1e-3 * scale)
    assert total + found.rest == pytest.approx(found.logit, abs=1e-6 * scale)


def test_attribution_through_later_layers_is_the_gradient_of_the_model_itself(case: Case, ids: list[int]) -> None:
    hook_point, token = "blocks.0.attn.hook_z", 41
    sae = random_sae(case.opened.hook_width(hook_point), hook_point)
    found = attribute(case.opened, sae, ids, position=len(ids) - 1, token=token, hook_point=hook_point)
    assert not found.exact
    assert found.held_fixed == ()
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_(True))
        return leaves[0]

    with replaced(*case.place(hook_point), leaf):
        logits = case.plain(torch.tensor([ids])).logits[0, -1]
    (gradient,) = torch.autograd.grad(logits[token] - logits.mean(), leaves)
    acts = sae.encode(leaves[0][0].detach().float()).double()
    expected = acts * (gradient[0] @ sae.W_dec.double().T)
    assert found.features.tolist() == torch.nonzero(acts)[:, 1].tolist()
    torch.testing.assert_close(found.by_feature.double(), expected[acts > 0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mlp.hook_pre", "an activation function or a gate lies between"),
        ("attn.hook_q", "the softmax of attention"),
        ("attn.hook_k", "the softmax of attention"),
        ("attn.hook_v", "an attention pattern that depends on the text"),
        ("mlp.hook_in", "not a part of the residual stream"),
    ],
)
def test_where_no_linear_path_leads_to_the_logits_the_reason_is_said(case: Case, name: str, reason: str) -> None:
    hook_point = f"blocks.1.{name}"
    if case.name == "OLMo 2" and name == "mlp.hook_in":
        return  # there it is the residual stream itself: no norm lies before the MLP
    if case.name == "Mixtral" and name == "mlp.hook_pre":
        reason = "not a part of the residual stream|an activation function"
    said = case.opened.why_no_path(hook_point)
    assert said is not None
    assert re.search(reason, said)
    assert said.startswith(f"{hook_point} has no linear path to the logits: ")
    with pytest.raises(NoLinearPath):
        case.opened.logit_weights(torch.zeros(1, 4), hook_point)


@pytest.mark.parametrize("layer", [0, 1])
def test_pushes_by_source_token_and_head_are_what_removing_the_value_changes(
    case: Case, ids: list[int], layer: int
) -> None:
    """The truth: in plain transformers, one value head's output at one source token is set to zero; patterns stay."""
    if not hasattr(case.sublayer(layer, "attn"), "v_proj"):
        pytest.skip("queries, keys and values are one matrix in this family: no module of values alone")
    hook_point, feature = f"blocks.{layer}.attn.hook_z", 5
    sae = random_sae(case.opened.hook_width(hook_point), hook_point)
    found = paths(case.opened, sae, ids, feature=feature, position=len(ids) - 1, hook_point=hook_point)
    assert found.exact
    assert float(found.heads.sum()) + found.rest == pytest.approx(found.pre_act, abs=1e-5)
    encoder, values = sae.W_enc[:, feature].double(), case.sublayer(layer, "attn").v_proj
    z = seen_at(case, ids, *case.place(hook_point))[0, -1]
    n_heads = case.plain.config.num_attention_heads
    d_head = len(z) // n_heads
    kv_heads = values.weight.shape[0] // d_head
    for source in range(len(ids)):
        for group in range(kv_heads):

            def without(v: Tensor, source: int = source, group: int = group) -> Tensor:
                v = v.clone()
                v[0, source, group * d_head : (group + 1) * d_head] = 0
                return v

            with replaced(values, True, without):
                changed = seen_at(case, ids, *case.place(hook_point))[0, -1]
            reading = slice(group * n_heads // kv_heads, (group + 1) * n_heads // kv_heads)
            pushed = float(found.heads[0, reading, source].sum())
            assert pushed == pytest.approx(float((z - changed) @ encoder), abs=1e-4 * float(found.heads.abs().max()))


def test_head_shares_are_norms_of_the_decoders_parts() -> None:
    W_dec = torch.tensor([[3.0, 4.0, 0.0, 0.0, 5.0, 0.0], [0.0] * 6])
    assert head_shares(W_dec, 3).tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_an_unknown_hook_point_is_named_and_not_called_nonlinear(case: Case) -> None:
    with pytest.raises(ModelError, match=r"has no hook point 'blocks\.7\.hook_resid_post'"):
        case.opened.direct_path("blocks.7.hook_resid_post")


COLUMNS = (
    "blocks.0.hook_resid_post",
    "blocks.0.hook_resid_mid",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_attn_out",
    "blocks.0.mlp.hook_post",
    "blocks.0.hook_mlp_out",
)


def test_the_table_in_the_docs_is_what_the_models_give(case: Case) -> None:
    page = (Path(__file__).parent.parent / "docs" / "your-own-model.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {case.name} |")]
    said = [cell.strip() for cell in row.strip("|").split("|")][1:]
    found = []
    for hook_point in COLUMNS:
        try:
            path = case.opened.direct_path(hook_point)
        except ModelError:
            found.append("–")
            continue
        parts = [{"attn": "W_O", "mlp": "W_out"}[which(hook_point)]] if path.matrix is not None else []
        parts += ["× multiplier"] if path.factor != 1 else []
        parts += ["norm"] if path.norm is not None else []
        found.append(", ".join(parts) or "itself")
    read = case.opened.readout()
    found.append("LayerNorm" if read.norm.centred else "RMSNorm")
    found[-1] += ", scaled logits" if read.factor != 1 else ""
    found[-1] += ", soft cap" if read.soft_cap else ""
    assert said == found
