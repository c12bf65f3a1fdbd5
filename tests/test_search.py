"""Search by meaning: the features' texts, the cosine against a hand calculation, what is kept, the verb, the model."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections import Counter
from hashlib import sha256
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from browser_fixture import ARABIC, DEAD, DNA, KEYWORD, build_index
from fakes import WordCounts

import sae
from sae.cli import main
from sae.pipeline import PipelineError
from sae.pipeline.feature_texts import feature_texts, in_words, tokens_in_words
from sae.text import embedding
from sae.text.embedding import TextModelError, load_text_model
from store.common import StoreError
from store.features import FeatureIndex
from store.notes import NAME, Note, Notes

module = import_module("sae.pipeline.search")  # `pipeline.search` is the function
DIGITS = 9  # a feature of the fixture


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("search") / "tm"
    build_index(path / "features.zarr", d_sae=12, n_contexts=48)
    return path


@pytest.fixture
def directory(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "tm")


@pytest.fixture
def index(built: Path) -> FeatureIndex:
    return FeatureIndex.open(built / "features.zarr")


# --- texts -----------------------------------------------------------------------------------------------------------


def test_a_text_holds_the_domain_and_the_usual_tokens(index: FeatureIndex) -> None:
    texts = feature_texts(index)
    assert len(texts) == index.d_sae
    assert texts[DEAD] == ""
    for feature, domain in ((DNA, "dna"), (KEYWORD, "code"), (ARABIC, "arabic")):
        rows, _ = index.firings(feature)  # counted again, row by row
        counts = Counter(int(token) for token in index.tokens_of(rows))
        usual = sorted(counts, key=lambda token: (-counts[token], token))[:5]
        assert Counter(index.document_of(row).domain for row in rows.tolist())[domain] / len(rows) >= 0.5
        assert texts[feature] == f"{domain}. {tokens_in_words(map(index.token_bytes, usual))}"
    assert " arabic" in texts[ARABIC].removeprefix("arabic")


def test_tokens_are_put_in_words() -> None:
    assert in_words(b" def") == "def"
    assert in_words(b"(self") == "(self left parenthesis"
    assert in_words(" ذهب".encode()) == "ذهب arabic"
    assert in_words("é".encode()) == "é"
    assert in_words(b"17") == "17 number"
    assert in_words(b"->") == "-> hyphen-minus greater-than sign"
    assert in_words(b"\n    ") == "line break and indentation"
    assert in_words(b"\n") == "line break"
    assert in_words(b"    ") == "space"
    assert in_words(b"\xce") == "part of a character"
    # characters that control a terminal are named, not shown
    assert in_words("\u202e!\x1b".encode()) == "! right-to-left override exclamation mark"
    assert tokens_in_words([b" def", b"def"]) == "fires on def"
    assert tokens_in_words([]) == ""


# --- the cosine ------------------------------------------------------------------------------------------------------


def test_the_similarity_is_the_larger_cosine_of_the_two_texts(tmp_path: Path) -> None:
    words = ["cat", "dog", "tax"]
    fake = WordCounts(words)
    texts, own = ["cat cat dog", "tax", "", "dog tax tax"], ["", "cat. dog", "", "tax"]
    vectors = module.vectors(tmp_path / "m.npz", [*texts, *own], fake).reshape(2, 4, -1)
    found = module.Searchable(texts, own, vectors).similarities(fake.embed(["cat dog"], query=True)[0])

    def cosine(text: str) -> float:
        a = [text.replace(".", "").split().count(word) + fake.FLOOR for word in words]
        b = [1 + fake.FLOOR, 1 + fake.FLOOR, fake.FLOOR]
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    for first, second, value in zip(texts, own, found.tolist(), strict=True):
        cosines = [cosine(text) for text in (first, second) if text]
        assert math.isnan(value) if not cosines else value == pytest.approx(max(cosines), abs=1e-3)
    assert module.ranked(found).tolist() == [1, 0, 3]  # feature 2 has no text
    assert module.ranked(np.array([0.5, np.nan, 0.7, 0.5])).tolist() == [2, 0, 3]


def test_nothing_is_found_where_no_feature_has_a_text(tmp_path: Path) -> None:
    fake = WordCounts(["cat"])
    vectors = module.vectors(tmp_path / "m.npz", [""] * 6, fake).reshape(2, 3, -1)
    found = module.Searchable([""] * 3, [""] * 3, vectors).similarities(fake.embed(["cat"], query=True)[0])
    assert np.isnan(found).tolist() == [True] * 3
    assert module.ranked(found).tolist() == []
    assert module.median(found) is None
    assert not (tmp_path / "m.npz").exists()


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_only_texts_that_changed_are_embedded_again(tmp_path: Path) -> None:
    path, fake = tmp_path / module.CACHE, WordCounts(["a", "b", "c"])
    told: list[tuple[int, int]] = []
    first = module.vectors(path, ["a", "b", "", "a"], fake, lambda *done: told.append(done))
    assert sorted(fake.asked) == ["a", "b"]  # equal texts once
    assert told == [(2, 2)]
    np.testing.assert_array_equal(first[0], first[3])
    again = module.vectors(path, ["a", "b", "", "a"], fake, lambda *done: told.append(done))
    assert len(fake.asked) == 2
    assert len(told) == 1
    np.testing.assert_array_equal(first, again)
    changed = module.vectors(path, ["a", "c", "b", "a"], fake)
    assert fake.asked[2:] == ["c"]
    np.testing.assert_array_equal(changed[2], first[1])
    other = WordCounts(["a", "b"], name="another model")
    assert module.vectors(path, ["a"], other).shape == (1, 2)
    assert other.asked == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == [module.CACHE]  # no half-written file


def test_what_was_embedded_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    path, texts = tmp_path / module.CACHE, ["a", "b", "a a", "b b", "a b", "b a"]

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.vectors(path, texts, WordCounts(["a", "b"]), stop)
    fake = WordCounts(["a", "b"])
    np.testing.assert_array_equal(module.vectors(path, texts, fake), fake.embed(texts).astype(np.float16))
    assert len(fake.asked) - len(texts) == 2  # the others were read


def damaged(content: bytes) -> list[bytes]:
    middle = len(content) // 2
    return [b"", content[:middle], content[:middle] + bytes(64) + content[middle + 64 :], b"PK\x03\x04 no archive"]


@pytest.mark.parametrize("kind", range(4))
def test_a_damaged_file_is_made_again(tmp_path: Path, kind: int) -> None:
    path, texts = tmp_path / module.CACHE, [f"a {'b ' * n}" for n in range(40)]
    expected = module.vectors(path, texts, WordCounts(["a", "b"]))
    path.write_bytes(damaged(path.read_bytes())[kind])
    fake = WordCounts(["a", "b"])
    np.testing.assert_array_equal(module.vectors(path, texts, fake), expected)
    assert len(fake.asked) == 40
    module.vectors(path, texts, fake)
    assert len(fake.asked) == 40  # read from the new file


def test_a_file_with_numbers_that_are_none_is_made_again(tmp_path: Path) -> None:
    path, fake = tmp_path / module.CACHE, WordCounts(["a", "b"])
    module.vectors(path, ["a"], fake)
    with np.load(path) as file:
        content = {name: file[name] for name in file.files}
    np.savez(path, **{**content, "vectors": np.full_like(content["vectors"], np.nan)})
    assert np.isfinite(module.vectors(path, ["a"], fake)).all()


def test_a_directory_that_cannot_be_written_is_searched_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = module.vectors(tmp_path / "file" / module.CACHE, ["a"], WordCounts(["a", "b"]))
    assert found[0, 0] == pytest.approx(1, abs=1e-3)


# --- the verb and its Python twin ------------------------------------------------------------------------------------


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> WordCounts:
    fake = WordCounts(["number", "arabic", "chemistry", "dna", "def"])
    monkeypatch.setattr(module, "load_text_model", lambda directory: fake)
    return fake


def test_what_is_planted_is_found_first(directory: Path, words: WordCounts) -> None:
    assert sae.search(directory, "arabic")["features"][0]["feature"] == ARABIC
    assert sae.search(directory / "features.zarr", "def")["features"][0]["feature"] == KEYWORD
    Notes(directory).put(Note(DEAD, "chemistry", "in short texts"))
    told = sae.search(directory, " chemistry ", n=3)
    found = told["features"]
    assert (found[0]["feature"], found[0]["label"], found[0]["text"]) == (DEAD, "chemistry", "")
    assert len(found) == 3
    assert [each["similarity"] for each in found] == sorted((each["similarity"] for each in found), reverse=True)
    everything = sae.search(directory, "chemistry", n=10_000)["features"]
    assert told["median_similarity"] == pytest.approx(statistics.median(each["similarity"] for each in everything))
    assert told["text_model"] == words.id


def test_the_verb_prints_what_the_function_finds(
    directory: Path, words: WordCounts, capsys: pytest.CaptureFixture[str]
) -> None:
    Notes(directory).put(Note(DNA, "chemistry \x1b[2J"))
    assert main(["search", str(directory), "dna", "--n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == sae.search(directory, "dna", n=2)
    capsys.readouterr()
    assert main(["search", str(directory), "chemistry", "--n", "1"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[1].split()[:3] == [str(DNA), "1.000", "“chemistry"]
    assert "\x1b" not in said


def test_the_kept_embeddings_follow_index_and_notes(directory: Path, words: WordCounts) -> None:
    sae.search(directory, "dna")
    before = len(words.asked)
    assert (directory / module.CACHE).is_file()
    sae.search(directory, "number")
    assert len(words.asked) == before
    Notes(directory).put(Note(3, "arabic arabic"))
    assert sae.search(directory, "arabic", n=2)["features"][0]["feature"] in (3, ARABIC)
    assert words.asked[before:] == ["arabic arabic"]
    shutil.rmtree(directory / "features.zarr")
    build_index(directory / "features.zarr", d_sae=16, n_contexts=48)
    found = sae.search(directory, "dna", n=16)["features"]
    assert max(each["feature"] for each in found) > 11


def test_wrong_questions_are_refused(directory: Path, words: WordCounts) -> None:
    with pytest.raises(PipelineError, match="the text to search for is empty"):
        sae.search(directory, "  ")
    with pytest.raises(PipelineError, match="n = 0"):
        sae.search(directory, "dna", n=0)
    with pytest.raises(StoreError, match="no feature index"):
        sae.search(directory / "nowhere", "dna")


# --- the text model --------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a text model in a package whose own code must not run, and a fake of sentence_transformers."""
    path = tmp_path / "package"
    (path / "model" / "1_Pooling").mkdir(parents=True)
    (path / "__init__.py").write_text("raise AssertionError('the code of the package was run')")
    for name in embedding.RELEASE:
        (path / "model" / name).write_text(f"content of {name}")
    digests = {name: sha256(f"content of {name}".encode()).hexdigest() for name in embedding.RELEASE}
    monkeypatch.setattr(embedding, "RELEASE", digests)
    fake = ModuleType("sentence_transformers")
    asked: dict[str, Any] = {}

    class SentenceTransformer:
        def __init__(self, path: str, **settings: Any) -> None:
            asked.update(settings, path=path)
            if "broken" in path:
                raise OSError("no such weights")

        def encode_document(self, texts: list[str], **settings: Any) -> list[list[float]]:
            return [[1.0, 0.0] for _ in texts]

        def encode_query(self, texts: list[str], **settings: Any) -> list[list[float]]:
            return [[0.0, 1.0] for _ in texts]

    fake.SentenceTransformer, fake.asked = SentenceTransformer, asked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    specs = {"sentence_transformers": None, embedding.PACKAGE: str(path / "__init__.py")}
    monkeypatch.setattr(embedding, "find_spec", lambda name: ModuleSpec(name, None, origin=specs[name]))
    load_text_model.cache_clear()
    yield path / "model"
    load_text_model.cache_clear()


def test_the_packaged_model_is_loaded_offline_from_files_that_were_checked(package: Path) -> None:
    model = load_text_model()
    asked = sys.modules["sentence_transformers"].asked
    assert asked["path"] == str(package)
    assert asked["local_files_only"] is True
    assert asked["trust_remote_code"] is False
    assert asked["model_kwargs"] == {"use_safetensors": True}
    assert model.id.startswith("all-MiniLM-L6-v2 ")
    assert model.embed(["a", "b"]).tolist() == [[1, 0], [1, 0]]
    assert model.embed(["a"], query=True).tolist() == [[0, 1]]


@pytest.mark.parametrize("change", ["another", "missing"])
@pytest.mark.parametrize("name", list(embedding.RELEASE))
def test_files_that_are_not_the_release_are_not_used(package: Path, name: str, change: str) -> None:
    (package / name).write_text("something else") if change == "another" else (package / name).unlink()
    with pytest.raises(TextModelError, match="is not the file of all-MiniLM-L6-v2's release"):
        load_text_model()
    assert not sys.modules["sentence_transformers"].asked


def test_another_directory_is_loaded_if_its_weights_are_not_pickled(package: Path, tmp_path: Path) -> None:
    other = shutil.copytree(package, tmp_path / "other")
    first = load_text_model(str(other)).id
    assert first.startswith("other ")
    (other / "config.json").write_text("changed")
    load_text_model.cache_clear()
    assert load_text_model(str(other)).id != first  # so its embeddings are made again
    (other / "2_Dense").mkdir()
    (other / "2_Dense" / "pytorch_model.bin").write_text("pickled")
    load_text_model.cache_clear()
    with pytest.raises(TextModelError, match="2_Dense: its weights are pickled"):
        load_text_model(str(other))
    with pytest.raises(TextModelError, match=r"no sentence-transformers model here \(no modules.json\)"):
        load_text_model(str(tmp_path))
    broken = shutil.copytree(package, tmp_path / "broken")
    with pytest.raises(TextModelError, match="the text model could not be loaded .OSError: no such weights."):
        load_text_model(str(broken))


def test_without_the_extra_the_verb_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "find_spec", lambda name: None)
    load_text_model.cache_clear()
    assert main(["search", str(directory), "dna"]) == 2
    assert "needs the extra search: pip install 'monosem[search]'" in capsys.readouterr().err
    assert not (directory / module.CACHE).exists()
    assert not (directory / NAME).exists()


@pytest.mark.slow
@pytest.mark.skipif(not embedding.is_installed(), reason="the extra `search` is not installed")
def test_the_real_model_finds_what_is_planted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    vectors = load_text_model().embed(["the cat", "a kitten", "tax law"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2]
    for text, feature in (("Arabic text", ARABIC), ("genes", DNA), ("digits", DIGITS)):
        assert feature in [each["feature"] for each in sae.search(directory, text, n=2)["features"]]
