"""Byte-level BPE: training, and the exact bytes of each token."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from os.path import commonprefix
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS = "<|endoftext|>"
SMALLEST_VOCAB = 257
PROBE = "The quick brown fox 0123 (é, 你好)!\n\tend."
FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
CUT = re.compile(r"(?<=[\w.,!?。！？])[ \n]")
CUT_SOUGHT = 10_000  # characters before a piece's end in which a cut is looked for


def train_tokenizer(texts: Iterable[str], d_vocab: int) -> Tokenizer:
    """A byte-level BPE of exactly `d_vocab` tokens; token 0 is the BOS (`<|endoftext|>`).

    Raises: ValueError when the text is too small for `d_vocab` tokens, or `d_vocab` too small for 256 bytes and BOS.
    """
    if d_vocab < SMALLEST_VOCAB:
        raise ValueError(
            f"tokenizer: a vocabulary of {d_vocab:,} is too small; the 256 bytes and BOS need {SMALLEST_VOCAB}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=d_vocab,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != d_vocab:
        raise ValueError(
            f"tokenizer: the text gives only {tokenizer.get_vocab_size():,} byte-pair tokens of the {d_vocab:,} "
            "asked for. Use more text or a smaller vocabulary."
        )
    return _literal(tokenizer)


def _literal(tokenizer: Tokenizer) -> Tokenizer:
    """Makes `<|endoftext|>` in a text plain text: BOS is set only by the harvester and the trainer, by its id."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def reading_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads special tokens in a text as such: `<|im_start|>` is one token."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`. Raises: ValueError when it is missing or not a tokenizer."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file.")
    return parse_tokenizer(path.read_bytes(), path)


def parse_tokenizer(raw: bytes, where: object) -> Tokenizer:
    """The tokenizer in the bytes of a `tokenizer.json`. Raises: ValueError naming `where` if they are not one."""
    try:
        tokenizer = _literal(Tokenizer.from_buffer(raw))
        tokenizer.encode(PROBE, add_special_tokens=False)  # some damage raises only here
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even Exceptions
        raise ValueError(f"{where} is not a tokenizer.json: {error}") from error


def pieces_of(tokenizer: Tokenizer, text: str, characters: int) -> Iterator[str]:
    """A long text in pieces of about `characters` characters; their token ids, joined, are those of the whole text.

    The cuts are before a space or line end that follows a letter, digit or punctuation mark, where byte-level
    tokenizers end a word, too. Other tokenizers may merge across such places; for them the text is one piece.
    """
    start, cuttable = 0, len(text) > characters and _ends_words_at_spaces(tokenizer)
    if cuttable and not tokenizer.encode_special_tokens:
        cuttable = not any(CUT.search(token.content) for token in tokenizer.get_added_tokens_decoder().values())
    while cuttable and len(text) - start > characters:
        limit = start + characters
        cuts = [found.start() for found in CUT.finditer(text, max(start + 1, limit - CUT_SOUGHT), limit)]
        if not cuts:
            found = CUT.search(text, limit)
            if found is None:
                break
            cuts = [found.start()]
        yield text[start : cuts[-1]]
        start = cuts[-1]
    yield text[start:]


def _ends_words_at_spaces(tokenizer: Tokenizer) -> bool:
    settings = json.loads(tokenizer.to_str())
    splits = settings["pre_tokenizer"] or {}
    usual = splits.get("type") == "ByteLevel" and splits.get("use_regex", True) and not splits["add_prefix_space"]
    return bool(usual) and settings["normalizer"] is None and settings["model"]["type"] == "BPE"


def continuation(tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` after the tokens `before`: what it adds to their text.

    Decoded alone it would lose a space at its beginning (SentencePiece), or the start of a character (byte tokens).
    """
    head = decode(tokenizer, before)
    whole = decode(tokenizer, [*before, *new])
    return whole[len(commonprefix([head, whole])) :]


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as its vocabulary spells it; `[id]` for an id without a token.

    Models embed more rows than their tokenizer has tokens (padding to a round number), and vocabularies have gaps.
    """
    return tokenizer.id_to_token(token_id) or f"[{token_id}]"


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a reader sees it, with `␣`, `↵` and `⇥` for white space; its name where it is no whole characters."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return text.translate(VISIBLE) if text and "\ufffd" not in text else token_name(tokenizer, token_id)


def token_ids(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The ids below `rows` that stand for a token, ascending."""
    return sorted(i for i in tokenizer.get_vocab(with_added_tokens=True).values() if i < rows)


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included; an id without a token is written `[id]`."""
    known = [bool(tokenizer.id_to_token(token_id)) for token_id in token_ids]
    if all(known):  # decoded together, because a character may be spread over several tokens
        text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text
    runs = groupby(zip(known, token_ids, strict=True), key=lambda pair: pair[0])
    return "".join(
        tokenizer.decode(ids, skip_special_tokens=False) if is_known else "".join(f"[{i}]" for i in ids)
        for is_known, run in runs
        for ids in [[token_id for _, token_id in run]]
    )


def token_bytes(tokenizer: Tokenizer, rows: int = 0) -> list[bytes]:
    """The bytes that each token id stands for, exact for byte-level tokenizers, and `[id]` for an id without a token.

    The table has an entry for every token, and for at least the ids below `rows` (the rows that a model embeds).
    Byte-level vocabularies write a byte as one printable character (GPT-2's table), SentencePiece's byte fallback
    writes it as `<0x0A>`; all other tokens (SentencePiece, WordPiece, special tokens) are their text in UTF-8.
    """
    added = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    pieces = {index: piece for piece, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    byte_of = _byte_of_character()
    settings = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([settings["pre_tokenizer"], settings["decoder"]])
    byte_fallback = bool(settings["model"].get("byte_fallback"))
    table: list[bytes] = []
    for index in range(max(rows, max(pieces, default=-1) + 1)):
        piece = added.get(index, pieces.get(index, ""))
        if not piece:
            table.append(f"[{index}]".encode())
        elif byte_fallback and FALLBACK_BYTE.fullmatch(piece):
            table.append(bytes([int(piece[3:5], 16)]))
        elif index in added or not byte_level or any(c not in byte_of for c in piece):
            text = piece if byte_level else piece.replace("\u2581", " ")
            table.append(text.encode("utf-8", "surrogatepass"))
        else:
            table.append(bytes(byte_of[c] for c in piece))
    return table


def _byte_of_character() -> dict[str, int]:
    """GPT-2's reversible table: printable Latin-1 is itself, the other 68 bytes are U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(shifted)}
