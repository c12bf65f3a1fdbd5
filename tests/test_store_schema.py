"""Number formats, checksums and atomic files against independent truth."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.common import StoreError, exclusive_lock
from store.schema import atomic_json, crc32c, decode, encode, read_json


def nearest_bfloat16(value: float) -> float:
    """Of the two neighbours that keep the upper 16 bits, the nearer; of equals, the even one."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    low = bits & 0xFFFF0000
    down, up = (struct.unpack("<f", struct.pack("<I", candidate))[0] for candidate in (low, low + 0x10000))
    below, above = abs(value - down), abs(up - value)
    if below == above:
        return down if (low >> 16) % 2 == 0 else up
    return down if below < above else up


@given(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126))
def test_bfloat16_rounds_to_nearest_even(value: float) -> None:
    stored = encode(np.array([value], np.float32), "bfloat16")
    assert stored.dtype == np.uint16
    assert decode(stored, "bfloat16")[0] == np.float32(nearest_bfloat16(value))


@pytest.mark.parametrize("upper", [0x3F80, 0x3F81, 0xC2FF, 0x0000, 0x0001])
def test_bfloat16_ties_go_to_the_even_neighbour(upper: int) -> None:
    tie = np.array([upper << 16 | 0x8000], np.uint32).view(np.float32)
    assert encode(tie, "bfloat16")[0] == upper + upper % 2


def test_bfloat16_keeps_what_is_not_a_number_and_marks_overflow() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    back = decode(encode(values, "bfloat16"), "bfloat16")
    assert np.isnan(back[0])
    assert back[1:].tolist() == [np.inf, -np.inf, np.inf]
    payload = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # would carry over
    assert np.isnan(decode(encode(payload, "bfloat16"), "bfloat16")).all()


def test_bfloat16_bits_pass_through() -> None:
    bits = np.arange(0, 0x7F80, 8, dtype=np.uint16).reshape(2, -1)
    assert np.array_equal(encode(bits, "bfloat16"), bits)
    again = encode(decode(bits, "bfloat16"), "bfloat16")
    assert np.array_equal(again, bits)


def test_every_float16_widens_as_numpy_widens_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for stored in (every, every.reshape(256, 256)[::-1, ::2]):
        assert np.array_equal(decode(stored, "float16"), stored.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_stored_value_survives(dtype: str) -> None:
    values = np.array([[0.0, -0.0, 1.5], [-2.0, 0.15625, 1024.0]], np.float64)
    back = decode(encode(values, dtype), dtype)
    assert back.dtype == np.float32
    assert np.array_equal(back, values)


def test_float16_overflow_is_inf_for_the_caller_to_find() -> None:
    assert np.isinf(encode(np.array([7e4], np.float32), "float16")).all()


def test_wrong_dtypes_are_named() -> None:
    with pytest.raises(StoreError, match="float8"):
        encode(np.zeros(3), "float8")
    with pytest.raises(StoreError, match="int64"):
        encode(np.zeros(3, np.int64), "float16")
    with pytest.raises(StoreError, match="uint16"):
        encode(np.zeros(3, np.uint16), "float16")
    with pytest.raises(StoreError, match="uint16"):
        decode(np.zeros(3, np.float32), "bfloat16")


def test_crc32c_is_the_castagnoli_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # check value of the CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert crc32c(array) == crc32c(array.tobytes())
    assert crc32c(array.T) == crc32c(array.T.tobytes())


def test_atomic_json_round_trip_and_equal_bytes(tmp_path) -> None:
    path = tmp_path / "a.json"
    atomic_json(path, {"b": [1, None], "a": "é"})
    first = path.read_bytes()
    atomic_json(path, {"a": "é", "b": [1, None]})
    assert path.read_bytes() == first
    assert read_json(path) == {"a": "é", "b": [1, None]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_atomic_json_failure_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "a.json"
    atomic_json(path, 1)
    with pytest.raises(StoreError, match=r"a\.json"):
        atomic_json(path, {"value": float("nan")})
    with pytest.raises(StoreError, match=r"a\.json"):
        atomic_json(path, object())
    assert read_json(path) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path) -> None:
    """The new file replaces the old one's name, not its bytes: at no moment does a reader see half of each."""
    path = tmp_path / "a.json"
    atomic_json(path, [0] * 20)
    with open(path) as old:
        atomic_json(path, [1] * 10)
        assert json.load(old) == [0] * 20
    assert read_json(path) == [1] * 10


def test_read_json_names_the_file(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"gone\.json"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StoreError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")


def test_lock_is_exclusive_and_freed(tmp_path) -> None:
    lock = tmp_path / "x.lock"
    second = exclusive_lock(lock, "x")
    with exclusive_lock(lock, "x"), pytest.raises(StoreError, match=rf"x is being written by pid {os.getpid()} on "):
        second.__enter__()
    with exclusive_lock(lock, "x"):
        pass
