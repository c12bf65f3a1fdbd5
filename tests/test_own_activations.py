"""Activations that come as arrays: what is stored equals the arrays, whatever the format; and training to index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as some
from safetensors.torch import save_file

import sae
from sae import pipeline
from sae.cli import main
from sae.harvesting.samples import plan_rows, samples_of
from store.activations import ActivationStore
from store.common import SPLITS, StoreError
from store.features import FeatureIndex

SAMPLES, POSITIONS, D_IN = 60, 5, 6


@pytest.fixture(scope="module")
def made() -> np.ndarray:
    """Activations [samples, positions, d_in]."""
    return np.random.default_rng(0).standard_normal((SAMPLES, POSITIONS, D_IN)).astype(np.float32)


def stored_slices(path: Path | str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Of each context: its split, the slice of the array that it says it holds, and its kept rows."""
    store = ActivationStore.open(path)
    assert store.is_complete
    assert not store.verify()
    (hook,) = store.hook_points
    for split in SPLITS:
        for shard, marker in store.markers(split).items():
            contexts = store.read_contexts(split, shard)
            acts = store.read_acts(split, shard, hook).reshape(*contexts.tokens.shape, -1)
            for rows, keep, document in zip(acts, contexts.keep, contexts.document, strict=True):
                yield split, marker.documents[int(document[0])].source, rows[keep]


def check_equal(path: Path | str, samples: Any) -> None:
    """Every row of the store is the array's row at the place that the store names, and none is missing or double."""
    rows = 0
    names = []
    for _, name, held in stored_slices(path):
        found = re.fullmatch(r"[^\[]*\[(?:(\d+), )?(\d+):(\d+)\]", name)
        assert found
        of_sample = samples if found[1] is None else samples[int(found[1])]
        np.testing.assert_array_equal(held, np.asarray(of_sample[int(found[2]) : int(found[3])], np.float32))
        rows += len(held)
        names.append(name)
    assert len(set(names)) == len(names)
    assert rows == (sum(map(len, samples)) if np.ndim(samples[0]) == 2 else len(samples))


# --- formats ---------------------------------------------------------------------------------------------------------


def as_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path / "acts.npy", array)
    return path / "acts.npy"


def as_fortran_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path / "acts.npy", np.asfortranarray(array))
    return path / "acts.npy"


def as_big_endian_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path / "acts.npy", array.astype(array.dtype.newbyteorder(">")))
    return path / "acts.npy"


def as_safetensors(path: Path, array: np.ndarray) -> Path:
    save_file({"acts": torch.from_numpy(array), "ids": torch.arange(3)}, path / "acts.safetensors")
    return path / "acts.safetensors"


def as_zarr_3(path: Path, array: np.ndarray) -> Path:
    zarr.save_array(path / "acts.zarr", array, zarr_format=3)
    return path / "acts.zarr"


def as_zarr_2_group(path: Path, array: np.ndarray) -> Path:
    zarr.open_group(path / "g.zarr", mode="w", zarr_format=2).create_array(
        "acts", data=array, chunks=(7, *array.shape[1:])
    )
    return path / "g.zarr"


def as_parquet(path: Path, array: np.ndarray) -> Path:
    pq.write_table(pa.table({"acts": array.tolist(), "n": range(len(array))}), path / "acts.parquet", row_group_size=7)
    return path / "acts.parquet"


def as_arrow_stream(path: Path, array: np.ndarray) -> Path:
    """As `datasets` saves to disk."""
    (path / "set").mkdir()
    table = pa.table({"acts": array.tolist()})
    with (
        pa.OSFile(str(path / "set" / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as w,
    ):
        w.write_table(table, max_chunksize=9)
    (path / "set" / "state.json").write_text("{}")
    return path / "set"


def as_numbered_parts(path: Path, array: np.ndarray) -> Path:
    (path / "parts").mkdir()
    for i, part in enumerate(np.array_split(array, 12)):  # more than ten: part-10 comes after part-9
        np.save(path / "parts" / f"part-{i}.npy", part)
    return path / "parts"


FORMATS = (
    as_npy,
    as_fortran_npy,
    as_big_endian_npy,
    as_safetensors,
    as_zarr_3,
    as_zarr_2_group,
    as_parquet,
    as_arrow_stream,
    as_numbered_parts,
)


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("flat", [False, True], ids=["samples", "rows"])
def test_rows_in_the_store_equal_those_of_the_array(
    tmp_path: Path, made: np.ndarray, write: Callable[[Path, np.ndarray], Path], flat: bool
) -> None:
    array = made.reshape(-1, D_IN) if flat else made
    out = pipeline.store_activations(write(tmp_path, array), tmp_path / "out.zarr")
    check_equal(out, array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_float_format_is_kept_exactly(tmp_path: Path, made: np.ndarray, dtype: str) -> None:
    tensor = torch.from_numpy(made).to(getattr(torch, dtype))
    save_file({"acts": tensor}, tmp_path / "acts.safetensors")
    out = pipeline.store_activations(tmp_path / "acts.safetensors", tmp_path / "out.zarr")
    assert ActivationStore.open(out).dtype == {"acts": "float32" if dtype == "float64" else dtype}
    check_equal(out, tensor.float().numpy())


def test_bfloat16_becomes_another_dtype_by_its_values(tmp_path: Path, made: np.ndarray) -> None:
    tensor = torch.from_numpy(made).bfloat16()
    out = pipeline.store_activations(tensor, tmp_path / "out.zarr", dtype="float32")
    check_equal(out, tensor.float().numpy())


def test_samples_of_unequal_length_are_padded_and_none_is_lost(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ragged = [rng.standard_normal((1 + i % 7, 4)).astype(np.float32) for i in range(50)]
    columns = {"frames": pa.array([r.tolist() for r in ragged], pa.list_(pa.list_(pa.float32())))}
    pq.write_table(pa.table(columns), tmp_path / "audio.parquet", row_group_size=11)
    check_equal(pipeline.store_activations(tmp_path / "audio.parquet", tmp_path / "out.zarr"), ragged)


def test_two_arrays_of_the_same_rows_are_two_hook_points(tmp_path: Path, made: np.ndarray) -> None:
    save_file({"mlp.in": torch.from_numpy(made), "mlp.out": torch.from_numpy(-made)}, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=r"several arrays \(mlp.in, mlp.out\)"):
        pipeline.store_activations(tmp_path / "both.safetensors", tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    both = ("mlp.in", "mlp.out")
    out = pipeline.store_activations(tmp_path / "both.safetensors", tmp_path / "out.zarr", hook_points=both)
    store = ActivationStore.open(out)
    np.testing.assert_array_equal(store.read_acts("train", 0, "mlp.in"), -store.read_acts("train", 0, "mlp.out"))


def test_files_that_look_like_layers_are_not_joined(tmp_path: Path, made: np.ndarray) -> None:
    for layer in range(3):
        np.save(tmp_path / f"layer{layer}.npy", made)
    with pytest.raises(ValueError, match="several arrays"):
        pipeline.store_activations(tmp_path, tmp_path / "out.zarr")


# --- splits ----------------------------------------------------------------------------------------------------------


@given(
    lengths=some.lists(some.integers(0, 40), min_size=2, max_size=60).filter(
        lambda found: sum(n > 0 for n in found) > 1
    ),
    row_bytes=some.integers(1, 1 << 24),
)
def test_every_row_is_in_one_context_and_every_sample_in_one_split(lengths: list[int], row_bytes: int) -> None:
    samples = samples_of(sum(lengths), np.array(lengths), None, "made up")
    plan = plan_rows(samples, "made up")
    rows = np.concatenate([np.arange(a, b) for a, b in zip(plan.start, plan.stop, strict=True)])
    assert np.array_equal(np.sort(rows), np.arange(sum(lengths)))
    split_of = {}
    for split in SPLITS:
        assert len(plan.contexts[split])
        shards: dict[int, np.ndarray] = {}
        for window in plan.windows(split, row_bytes):
            shards |= window
        assert sorted(shards) == list(range(plan.n_shards[split]))
        assert all(0 < len(contexts) <= plan.contexts_per_shard for contexts in shards.values())
        assert np.array_equal(np.sort(np.concatenate(list(shards.values()))), plan.contexts[split])
        for sample in plan.sample[plan.contexts[split]].tolist():
            assert split_of.setdefault(sample, split) == split


def test_a_sorted_array_is_spread_over_the_shards() -> None:
    """Every shard holds contexts from all over the array, which may be sorted by class."""
    plan = plan_rows(samples_of(64 * 7000, None, 64, "made up"), "made up")
    (window,) = plan.windows("train", 4)
    spans = [(int(c.min()), int(c.max())) for c in window.values()]
    assert max(low for low, _ in spans) < 200
    assert min(high for _, high in spans) > 6_800


def test_a_long_sample_is_cut_and_stays_in_one_split(tmp_path: Path) -> None:
    long = np.random.default_rng(2).standard_normal((6, 5000, 2)).astype(np.float32)
    out = pipeline.store_activations(long, tmp_path / "out.zarr")
    check_equal(out, long)
    split_of: dict[str, set[str]] = {}
    for split, name, _ in stored_slices(out):
        split_of.setdefault(name.split(",")[0], set()).add(split)
    assert len(split_of) == 6
    assert all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((1, 5, 3), np.float32), "has 1 sample; training and held-out rows need at least one each"),
        (np.ones((40, 3), np.float32), "has 1 block of 64 rows"),
        (np.ones((40, 3), np.int64), "holds no activations"),
        (np.ones(40, np.float32), "holds no activations"),
    ],
)
def test_what_cannot_be_split_or_stored_is_refused(tmp_path: Path, array: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline.store_activations(array, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()


# --- bad values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(tmp_path: Path, made: np.ndarray, value: float) -> None:
    bad = made.copy()
    bad[7, 3, 2] = value
    with pytest.raises(ValueError, match=re.escape(f"row {7 * POSITIONS + 3} (arrays in memory[7, 3]) holds")):
        pipeline.store_activations(bad, tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    keep = np.ones((SAMPLES, POSITIONS), bool)
    keep[7, 3] = False
    out = pipeline.store_activations(bad, tmp_path / "out.zarr", keep=keep)
    assert sum(len(held) for _, _, held in stored_slices(out)) == SAMPLES * POSITIONS - 1


def test_the_smallest_number_that_overflows_is_refused_and_the_one_below_it_is_not(tmp_path: Path) -> None:
    rows = np.zeros((4, 2, 1), np.float32)
    for dtype in ("float16", "bfloat16"):
        largest = torch.finfo(getattr(torch, dtype)).max
        low, high = np.float32(largest), np.float32(3.4e38)
        for _ in range(60):  # bisection on what torch rounds to infinity
            middle = np.float32(low / 2 + high / 2)
            low, high = (low, middle) if torch.tensor(middle).to(getattr(torch, dtype)).isinf() else (middle, high)
        rows[1, 1, 0] = high
        with pytest.raises(ValueError, match=rf"row 3 .* too large for {dtype}"):
            pipeline.store_activations(rows, tmp_path / dtype, dtype=dtype)
        rows[1, 1, 0] = low
        assert ActivationStore.open(pipeline.store_activations(rows, tmp_path / dtype, dtype=dtype)).is_complete


# --- beside the rows -------------------------------------------------------------------------------------------------


def test_ids_texts_and_masks_of_a_dataset_come_from_its_own_columns(tmp_path: Path, made: np.ndarray) -> None:
    ids = np.arange(SAMPLES * POSITIONS).reshape(SAMPLES, POSITIONS) % 11
    mask = (ids != 4).astype(np.int8)
    columns = {
        "acts": made.tolist(),
        "input_ids": ids.tolist(),
        "mask": mask.tolist(),
        "kind": [f"k{i % 3}" for i in range(SAMPLES)],
    }
    pq.write_table(pa.table(columns), tmp_path / "set.parquet", row_group_size=13)
    out = pipeline.store_activations(
        tmp_path / "set.parquet", tmp_path / "out.zarr", token_ids="input_ids", keep="mask", labels="kind"
    )
    store = ActivationStore.open(out)
    for split in SPLITS:
        for shard, marker in store.markers(split).items():
            held = store.read_contexts(split, shard)
            for tokens, keep, number in zip(held.tokens, held.keep, held.document[:, 0], strict=True):
                sample = int(re.findall(r"\[(\d+),", marker.documents[int(number)].source)[0])
                assert np.array_equal(tokens, ids[sample])
                assert np.array_equal(keep, mask[sample])
                assert marker.documents[int(number)].domain == f"k{sample % 3}"
    assert store.vocabulary()[10] == b"[10]"


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"images": ["a.png"] * 3}, "images has 3 entries; expected 60"),
        ({"texts": ["a"] * 7}, r"texts has 7 entries; expected 60 .* or 300"),
        ({"token_ids": np.arange(9)}, r"token-ids has 9 entries; expected 300"),
        ({"token_ids": np.full(300, -1)}, "found -1"),
        ({"keep": np.zeros(300, bool)}, "leaves no row in the heldout split"),
        ({"labels": "no-such-column"}, "no such file"),
        ({"tokenizer": "tokenizer.json"}, "and none are given"),
    ],
)
def test_what_lies_beside_must_fit_the_rows(
    tmp_path: Path, made: np.ndarray, beside: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline.store_activations(made, tmp_path / "out.zarr", **beside)
    assert not (tmp_path / "out.zarr").exists()


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_an_import_that_was_stopped_continues_to_the_same_bytes(
    tmp_path: Path, made: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline.store_activations(made, tmp_path / "whole.zarr")
    write, count = ActivationStore.write_shard, 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise OSError("killed")
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "write_shard", stopping)
        with pytest.raises(OSError, match="killed"):
            pipeline.store_activations(made, tmp_path / "out.zarr")
    assert not ActivationStore.open(tmp_path / "out.zarr").is_complete
    with pytest.raises(StoreError, match="made with other settings"):
        pipeline.store_activations(made + 1, tmp_path / "out.zarr")
    pipeline.store_activations(made, tmp_path / "out.zarr")
    files = {p.relative_to(whole): p.read_bytes() for p in Path(whole).rglob("*") if p.is_file()}
    assert {
        p.relative_to(tmp_path / "out.zarr"): p.read_bytes() for p in (tmp_path / "out.zarr").rglob("*") if p.is_file()
    } == files


# --- from array to index ---------------------------------------------------------------------------------------------


def test_the_patches_of_images_from_a_vit_become_features(tmp_path: Path) -> None:
    """A vision transformer of `transformers`, which TransformerLens does not open, from its activations to features."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTModel(ViTConfig(**size, image_size=16, patch_size=8)).eval()
    with torch.no_grad():
        acts = vit(torch.randn(200, 3, 16, 16)).last_hidden_state.numpy()  # [200, 1 + 4 patches, 16]
    np.save(tmp_path / "acts.npy", acts)
    (tmp_path / "images.txt").write_text("".join(f"images/{i}.png\n" for i in range(200)))
    store, out = tmp_path / "run" / "acts.zarr", tmp_path / "run" / "sae"
    beside = ["--from", f"images={tmp_path / 'images.txt'}", "--model", "vit"]
    assert main(["harvest", "--from", str(tmp_path / "acts.npy"), *beside, "--out", str(store)]) == 0
    check_equal(store, acts)
    sizes = ["--d-sae", "32", "--l0", "4", "--tokens", "20000", "--batch-tokens", "256"]
    assert main(["train", "--acts", str(store), "--out", str(out), *sizes]) == 0
    assert main(["eval", str(out)]) == 0
    assert main(["index", str(out)]) == 0
    assert main(["export", str(out), "--format", "sae-lens", "--out", str(tmp_path / "exported")]) == 0

    dictionary = sae.load(out)
    measured = pipeline.evaluate(dictionary, store=store)["metrics"]
    assert not [name for name in measured if name.startswith(("ce_", "kl", "delta"))]
    x = np.concatenate([held for split, _, held in stored_slices(store) if split == "heldout"]).astype(np.float64)
    tensors = {name: tensor.double().numpy() for name, tensor in dictionary.tensors().items()}
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    f = np.where(pre > np.maximum(tensors["threshold"], 0), pre, 0)
    error = ((x - f @ tensors["W_dec"] - tensors["b_dec"]) ** 2).sum()
    assert measured["fvu"]["value"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)
    assert measured["l0"]["value"] == pytest.approx((f > 0).sum(1).mean(), rel=1e-6)

    index = FeatureIndex.open(out / "features.zarr")
    assert not index.has("logits/top_id")
    feature = int(np.argmax(index.stats["count"]))
    rows, values = index.firings(feature)
    for row, value in zip(rows[:20].tolist(), values[:20].tolist(), strict=True):
        sample, position = map(int, re.findall(r"\[(\d+), (\d+)\]", index.row_name(row))[0])
        pre_act = (acts[sample, position] - tensors["b_dec"]) @ tensors["W_enc"][:, feature] + tensors["b_enc"][feature]
        assert value == pytest.approx(pre_act, rel=1e-3)
        assert index.document_of(row).id == f"images/{sample}.png"
        assert index.token_bytes(int(index.tokens_of(np.array([row]))[0])) == str(position).encode()


@pytest.mark.parametrize("verb", ["steer", "controls"])
def test_verbs_that_need_the_model_say_that_there_is_none(
    tmp_path: Path, made: np.ndarray, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = pipeline.store_activations(made, tmp_path / "acts.zarr")
    sizes: dict[str, Any] = {"d_sae": 24, "l0": 2, "tokens": 600, "config": {"batch_tokens": 100}}
    pipeline.train(store, tmp_path / "sae", **sizes)
    more = ["--feature", "1", "--set", "5", "--prompt", "a"] if verb == "steer" else []
    assert main([verb, str(tmp_path / "sae"), *more]) == 2
    assert "came as arrays" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text", "default"], "either --model NAME and --text SOURCE, or --from PATH"),
        (["--tokens", "5"], "--tokens does not go with --from"),
        (["--from", "b.npy"], "takes one path of activations"),
    ],
)
def test_flags_of_a_harvest_by_model_are_refused(
    tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["harvest", "--from", "a.npy", *flags, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
