"""scripts/splitting.py: a domain's features at each size, and the edges between them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from fakes import HOOK_POINT

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import splitting  # noqa: E402

import sae  # noqa: E402
from sae.dictionary.files import save  # noqa: E402
from store.activations import ActivationStore  # noqa: E402


@torch.no_grad()
def dictionary(directory: Path, d_sae: int) -> sae.SAE:
    torch.manual_seed(d_sae)
    made = sae.SAE(32, d_sae)
    made.W_enc.copy_(torch.randn(32, d_sae))
    made.b_enc.fill_(-1.0)
    save(made, directory, {"hook_point": HOOK_POINT, "train": {"tokens": 7}})
    return sae.load(directory)


def dense_counts(made: sae.SAE, store: ActivationStore, domain: str) -> np.ndarray:
    """Firings [d_sae, 2] row by row: in the domain, anywhere."""
    documents, counts = store.documents("heldout"), np.zeros((made.d_sae, 2), np.int64)
    for shard in sorted(store.markers("heldout")):
        contexts = store.read_contexts("heldout", shard)
        acts = torch.from_numpy(store.read_acts("heldout", shard, HOOK_POINT))
        with torch.no_grad():
            fired = (made.encode(acts) > 0).numpy()
        for row, (keep, number) in enumerate(zip(contexts.keep.flat, contexts.document.flat, strict=True)):
            if keep:
                counts[:, 1] += fired[row]
                counts[:, 0] += fired[row] & (documents[int(number)][2] == domain)
    return counts


def test_a_domains_features_and_the_edges_between_them(
    tmp_path: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore.open(tiny_store)
    small, large = dictionary(tmp_path / "small", 24), dictionary(tmp_path / "large", 48)
    counts = [dense_counts(made, store, "dna") for made in (small, large)]
    found = splitting.firings([small, large], store, "dna", 10**9)
    assert np.array_equal(found[0], counts[0])
    assert np.array_equal(found[1], counts[1])
    monkeypatch.setattr(splitting, "MAIN_SHARE", float(np.median(counts[0][:, 0] / counts[0][:, 1].clip(1))))
    mine = [
        {int(f) for f in np.flatnonzero((c[:, 1] >= 10) & (c[:, 0] > splitting.MAIN_SHARE * c[:, 1]))} for c in counts
    ]
    other = next(f for f in range(24) if f not in mine[0])
    a, b = min(mine[0]), min(mine[1])
    (tmp_path / "compared").mkdir()
    edges = pa.table({"a": [a, other], "b": [b, b], "masked": [0.75, 0.9]})
    parquet.write_table(edges, tmp_path / "compared" / "edges.parquet")
    argv = [
        "splitting.py",
        "--acts",
        str(tiny_store),
        "--domain",
        "dna",
        "--json",
        str(tmp_path / "out.json"),
        "--sae",
        str(tmp_path / "small"),
        "--sae",
        str(tmp_path / "large"),
        "--tokens",
        "1000000",
        "--compare",
        str(tmp_path / "compared"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    assert splitting.main() == 0
    result = json.loads((tmp_path / "out.json").read_text())
    for level, part in enumerate(result["levels"]):
        assert {entry["feature"] for entry in part["features"]} == mine[level]
        for entry in part["features"]:
            assert entry["firings"] == counts[level][entry["feature"], 1]
    assert result["edges"] == [{"level": 0, "a": a, "b": b, "masked": 0.75}]
