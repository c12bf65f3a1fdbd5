"""Places of a run that can be patched: a hook point, or a head, a neuron or a feature there.

A site says how x changes when it takes its own part of another run's x: that difference is what patching adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.autoencoder import SAE, refuse_row_scale, refuse_transcoder
from sae.lm import LanguageModel, Splice


class Feature(NamedTuple):
    """A feature of a dictionary of the site's hook point."""

    sae: SAE
    number: int


@dataclass(frozen=True, eq=False)
class Site:
    """A part of the activations at `hook_point`: all columns, some of them, or one feature's contribution."""

    name: str
    hook_point: str
    columns: slice | None = None
    feature: Feature | None = None

    def change(
        self, x: Float[Tensor, "*batch d_in"], source: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_in"]:
        """What makes x's part that of `source`: `source − x` in the columns, `(a_source − a) · W_dec` of a feature."""
        if self.feature is not None:
            sae, number = self.feature
            acts, wanted = (feature_acts(sae, each, number) for each in (x, source))
            return (wanted - acts)[..., None] * sae.W_dec[number]
        if self.columns is None:
            return source - x
        found = torch.zeros_like(x)
        found[..., self.columns] = source[..., self.columns] - x[..., self.columns]
        return found

    def random_change(
        self, change: Float[Tensor, "*batch d_in"], generator: torch.Generator
    ) -> Float[Tensor, "*batch d_in"]:
        """A random direction with the norm of `change`, in a head's columns; of a neuron or feature, in all of them."""
        noise = torch.randn(change.shape, generator=generator).to(change)
        if self.columns is not None and self.columns.stop - self.columns.start > 1:  # one neuron has one direction only
            inside = torch.zeros_like(noise)
            inside[..., self.columns] = noise[..., self.columns]
            noise = inside
        scale: Tensor = change.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return noise * scale


@dataclass(frozen=True, eq=False)
class Several(Site):
    """Of each prompt the neurons, or the features of `sae`, in `chosen`, patched together."""

    chosen: Bool[Tensor, "prompt unit"] | None = None
    sae: SAE | None = None

    def change(
        self, x: Float[Tensor, "prompt pos d_in"], source: Float[Tensor, "prompt pos d_in"]
    ) -> Float[Tensor, "prompt pos d_in"]:
        """The sum of the units' changes."""
        assert self.chosen is not None
        chosen = self.chosen[:, None].to(x)
        if self.sae is None:
            return (source - x) * chosen
        found: Tensor = ((self.sae.encode(source) - self.sae.encode(x)) * chosen) @ self.sae.W_dec
        return found


def feature_acts(sae: SAE, x: Float[Tensor, "*batch d_in"], number: int) -> Float[Tensor, "*batch"]:
    """The activation of one feature."""
    return sae.encode(x)[..., number]


def heads_of(model: LanguageModel, layers: Sequence[int], part: str = "z") -> list[Site]:
    """The heads of some layers: their outputs (`z`), queries, keys or values. `L0.head.1` …"""
    found = []
    for layer in layers:
        hook_point = f"blocks.{layer}.attn.hook_{part}"
        width = model.hook_width(f"blocks.{layer}.attn.hook_z") // model.n_heads
        for head in range(model.hook_width(hook_point) // width):  # queries may share keys and values
            name = f"L{layer}.head.{head}" + ("" if part == "z" else f".{part}")
            found.append(Site(name, hook_point, slice(head * width, (head + 1) * width)))
    return found


def stream_sites(model: LanguageModel, part: str = "resid_post") -> list[Site]:
    """The residual stream before the first block and after each, or `attn_out` or `mlp_out` of each."""
    layers = range(model.n_layers)
    if part != "resid_post":
        return [Site(f"L{layer}.{part}", f"blocks.{layer}.hook_{part}") for layer in layers]
    entering = Site("embedding", "blocks.0.hook_resid_pre")
    return [entering, *(Site(f"L{layer}.resid_post", f"blocks.{layer}.hook_resid_post") for layer in layers)]


def neurons_of(model: LanguageModel, layer: int) -> list[Site]:
    """The neurons of a layer."""
    hook_point = f"blocks.{layer}.mlp.hook_post"
    return [Site(f"L{layer}.neuron.{i}", hook_point, slice(i, i + 1)) for i in range(model.hook_width(hook_point))]


def features_of(sae: SAE, hook_point: str, numbers: Sequence[int]) -> list[Site]:
    """Features of a dictionary. Raises: ValueError for a transcoder or a dictionary that normalises rows."""
    refuse_transcoder(sae, "patching")
    refuse_row_scale(sae, "patching")
    return [Site(f"feature.{i}", hook_point, feature=Feature(sae, i)) for i in numbers]


def patched(
    site: Site,
    source: Float[Tensor, "prompt pos d_in"],
    where: Bool[Tensor, "prompt pos"] | None = None,
    *,
    random: torch.Generator | None = None,
) -> Splice:
    """The splice that gives a site its part of `source` at the positions `where` (default: all).

    With `random`, a random direction of equal norm instead.
    """

    def splice(x: Float[Tensor, "prompt pos d_in"]) -> Float[Tensor, "prompt pos d_in"]:
        change = site.change(x, source.to(x))
        if random is not None:
            change = site.random_change(change, random)
        return x + change if where is None else torch.where(where[..., None].to(x.device), x + change, x)

    return splice


def at(positions: Int[Tensor, " prompt"], like: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt pos"]:
    """A mask of one position in each prompt."""
    return torch.arange(like.shape[1])[None] == positions[:, None]


def recording(found: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """A splice that changes nothing and keeps the value in `found`."""

    def splice(x: Tensor) -> Tensor:
        found[name] = x.detach().clone()
        return x

    return splice
