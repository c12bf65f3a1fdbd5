"""Absorption on planted tokens: a parent feature that is silent on one token, one that is not, one that is split."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from sae.analysis.absorption import Tokens, absorption, kinds_of_token

D_IN, D_VOCAB, MEMBERS = 12, 40, 10  # tokens 0 … 9 are of the kind
KIND = {"kind": np.arange(D_VOCAB) < MEMBERS}
PARENT, CHILD, OTHER, HALF = range(4)
rng = np.random.default_rng(0)
W_DEC = np.linalg.qr(rng.normal(size=(D_IN, D_IN)))[0][:4]
W_DEC[CHILD] = (W_DEC[CHILD] + W_DEC[PARENT]) / np.sqrt(2)  # the child's token is of the kind: it adds to the probe


def tokens(how: str, seed: int) -> Tokens:
    """Rows of x in which the kind is a direction, with features that are absorbed, whole or split."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, D_VOCAB, 8000)
    kind, seven = ids < MEMBERS, ids == 7
    acts = np.zeros((len(ids), 4))
    acts[:, OTHER] = (~kind) * 1.0
    acts[:, PARENT] = kind * 1.0
    acts[:, CHILD] = seven * np.sqrt(2)
    if how == "absorbed":
        acts[seven, PARENT] = 0
    if how == "split":  # two features share the kind's tokens between them
        acts[:, CHILD] = 0
        acts[:, HALF] = (kind & (ids < 5)) * 1.0
        acts[ids < 5, PARENT] = 0
    weights = W_DEC.copy()
    if how == "split":
        weights[HALF] = W_DEC[PARENT]
    x = kind[:, None] * W_DEC[PARENT] - (~kind)[:, None] * W_DEC[PARENT] + rng.normal(0, 0.05, (len(ids), D_IN))
    return Tokens(ids, x, sparse.csr_array(acts))


@pytest.mark.parametrize(("how", "rate"), [("absorbed", 0.1), ("whole", 0.0), ("split", 0.0)])
def test_the_rate_is_the_share_of_the_absorbed_token(how: str, rate: float) -> None:
    found = absorption(tokens(how, 0), tokens(how, 1), KIND, W_DEC)
    assert found["kinds"]["kind"]["probe_accuracy"] > 0.99
    test = tokens(how, 1)
    exact = (test.ids[test.ids < MEMBERS] == 7).mean() if rate else 0.0
    assert found["mean"] == pytest.approx(exact, abs=1e-9)
    assert exact == pytest.approx(rate, abs=0.02)


def test_kinds_that_a_probe_cannot_recognise_are_left_out() -> None:
    train, test = tokens("absorbed", 0), tokens("absorbed", 1)
    noise = [part._replace(x=np.random.default_rng(9).normal(size=part.x.shape)) for part in (train, test)]
    assert absorption(noise[0], noise[1], KIND, W_DEC)["mean"] is None
    assert absorption(train, test, {"rare": np.arange(D_VOCAB) < 0}, W_DEC)["kinds"] == {}


def test_kinds_of_token() -> None:
    vocabulary = [b" Apple", b"a", b"7b", b" (", b"\n\n", b"\xd8", b"", b" "]
    kinds = {name: np.flatnonzero(members).tolist() for name, members in kinds_of_token(vocabulary).items()}
    assert kinds["first letter a"] == [0, 1]
    assert kinds["capital"] == [0]
    assert kinds["digit"] == [2]
    assert kinds["punctuation"] == [3]
    assert kinds["leading space"] == [0, 3, 7]
    assert kinds["white space"] == [4, 7]
    assert kinds["beyond ASCII"] == [5]
    assert kinds["first letter z"] == []
