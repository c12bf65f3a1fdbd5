"""Token bytes → readable text. Token text may be hostile: it must never become markup.

A byte-level token may hold part of a character. The token that completes a character shows it; the tokens before it
show their bytes as hex.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

Piece = tuple[str, str]  # ("text", "é") or ("hex", "c3")

# first byte of a UTF-8 sequence → its length
_LENGTH = {
    **dict.fromkeys(range(0xC2, 0xE0), 2),
    **dict.fromkeys(range(0xE0, 0xF0), 3),
    **dict.fromkeys(range(0xF0, 0xF5), 4),
}
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def pieces(tokens: Sequence[bytes]) -> list[list[Piece]]:
    """One list of pieces for each of `tokens`, which follow each other in a text."""
    if all(map(bytes.isascii, tokens)):
        return list(map(_ascii, tokens))
    shown: list[list[Piece]] = [[] for _ in tokens]
    pending: list[tuple[int, int]] = []  # (token, byte) of an incomplete character
    missing = 0

    def add(token: int, kind: str, text: str) -> None:
        last = shown[token][-1] if shown[token] else None
        if kind == "text" and last is not None and last[0] == "text":
            shown[token][-1] = ("text", last[1] + text)
        else:
            shown[token].append((kind, text))

    def give_up() -> None:
        for token, byte in pending:
            add(token, "hex", f"{byte:02x}")
        pending.clear()

    for i, raw in enumerate(tokens):
        if raw.isascii():  # most tokens
            if pending:
                give_up()
            shown[i] = _ascii(raw)
            continue
        for byte in raw:
            if pending and 0x80 <= byte < 0xC0:
                pending.append((i, byte))
                missing -= 1
                if missing:
                    continue
                character = _decode(bytes(b for _, b in pending))
                if character is None:  # a surrogate or an overlong encoding
                    give_up()
                    continue
                for token, earlier in pending:
                    if token != i:
                        add(token, "hex", f"{earlier:02x}")
                add(i, "text", character)
                pending.clear()
                continue
            give_up()
            if byte < 0x80:
                add(i, "text", chr(byte))
            elif byte in _LENGTH:
                pending, missing = [(i, byte)], _LENGTH[byte] - 1
            else:
                add(i, "hex", f"{byte:02x}")
    give_up()
    return shown


def _ascii(token: bytes) -> list[Piece]:
    return [("text", token.decode())] if token else []


@lru_cache(maxsize=1 << 16)
def label(token: bytes) -> str:
    """One token for a table, with spaces, line ends and bytes made visible."""
    (shown,) = pieces([token])
    return "".join(f"‹{text}›" if kind == "hex" else "".join(map(_visible, text)) for kind, text in shown)


def visible(text: str) -> str:
    """`text` with spaces, line ends and control characters made visible."""
    return "".join(map(_visible, text))


def plain_markdown(text: str) -> str:
    """`text` with Markdown escaped, for elements that always read Markdown (captions, buttons)."""
    return "".join(f"\\{character}" if character in "\\`*_{}[]<>()#+-.!$:~|" else character for character in text)


def _visible(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    # Cc, Cf: control characters, which may reorder or hide text; Zl, Zp: line separators.
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
        return f"‹{ord(character):02x}›"
    return character


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
