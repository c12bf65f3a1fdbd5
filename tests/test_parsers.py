"""Every parser of files reads any bytes or refuses them with a clear error."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.activation_layout import parse_attributes
from store.shards import parse_marker

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fuzz

from store.common import StoreError

SEEDS = fuzz.seeds()


@pytest.mark.parametrize("name", list(SEEDS))
def test_two_thousand_damaged_files_are_read_or_refused(name: str) -> None:
    parser, sound = SEEDS[name]

    @settings(max_examples=2000, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**64), st.booleans())
    def damaged(seed: int, whole_values: bool) -> None:
        rng = random.Random(seed)
        fuzz.accepts_or_refuses(parser, (fuzz.other_value if whole_values else fuzz.mutated)(sound, rng))

    damaged()
    assert fuzz.accepts_or_refuses(parser, sound)


@pytest.mark.parametrize("name", list(SEEDS))
@settings(max_examples=200, deadline=None, database=None)
@given(raw=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name: str, raw: bytes) -> None:
    fuzz.accepts_or_refuses(SEEDS[name][0], raw)


@given(share=st.floats(0, 0.999))
@settings(max_examples=100, deadline=None)
def test_truncated_markers_and_attributes_are_refused(share: float) -> None:
    marker, attributes = (SEEDS[name][1].rstrip() for name in ("marker", "attributes"))
    with pytest.raises(StoreError):
        parse_marker(marker[: int(share * len(marker))], 3, "m")
    with pytest.raises(StoreError):
        parse_attributes(attributes[: int(share * len(attributes))], "z")


def test_a_hook_name_that_leaves_the_store_is_refused() -> None:
    sound = SEEDS["attributes"][1]
    with pytest.raises(StoreError, match="hook_points"):
        parse_attributes(sound.replace(b'"blocks.0.mlp.hook_post": 4', b'"../../other": 4'), "zarr.json")


def test_the_fuzzer_reports_a_parser_that_fails() -> None:
    def fragile(raw: bytes) -> None:
        if b"\x00" in raw:
            raise IndexError("off the end")

    with pytest.raises(IndexError):
        fuzz.fuzz("fragile", fragile, b"sound", 5000, 0)
