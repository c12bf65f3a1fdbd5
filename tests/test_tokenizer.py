"""The byte-level BPE: exact bytes, exact vocabulary size, a BOS that text cannot forge."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sae.text.tokenizer import BOS, continuation, load_tokenizer, pieces_of, token_bytes, token_text, train_tokenizer

TEXTS = ["def forward(self, x): return self.out(x)\n" * 3, "Grüße, 世界! naïve café — 10% of 3.14\r\n\t" * 3]
TOKENIZER = train_tokenizer(TEXTS, 300)
TABLE = token_bytes(TOKENIZER)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_token_bytes_spell_the_text(text: str) -> None:
    assert b"".join(TABLE[i] for i in encode(text)) == text.encode()


@pytest.mark.parametrize(
    "text", ["", " ", "\0\x01\x7f", "e\u0301\u200d👩‍👩‍👧", BOS, f"a{BOS}b", "Ġ", "\ufeffx", "def forward"]
)
def test_token_bytes_spell_odd_texts(text: str) -> None:
    assert b"".join(TABLE[i] for i in encode(text)) == text.encode()


@pytest.mark.parametrize("token_id", range(300))
def test_a_token_is_read_as_its_bytes_with_visible_white_space(token_id: int) -> None:
    try:
        text = TABLE[token_id].decode()
    except UnicodeDecodeError:  # a part of a character
        assert token_text(TOKENIZER, token_id) == TOKENIZER.id_to_token(token_id)
        return
    for character, mark in (" ␣", "\n↵", "\t⇥", "\r␍"):
        text = text.replace(character, mark)
    assert token_text(TOKENIZER, token_id) == text


def test_every_byte_is_a_token_and_bos_is_token_zero() -> None:
    assert TOKENIZER.get_vocab_size() == len(TABLE) == 300
    assert TOKENIZER.token_to_id(BOS) == 0
    assert TABLE[0] == BOS.encode()
    assert {bytes([b]) for b in range(256)} <= set(TABLE)
    assert len(set(TABLE)) == 300


def test_text_cannot_forge_the_bos(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    reloaded = load_tokenizer(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, reloaded):
        assert 0 not in tokenizer.encode(f"x{BOS}y", add_special_tokens=False).ids
        assert 0 not in tokenizer.encode_batch_fast([BOS], add_special_tokens=False)[0].ids
    assert token_bytes(reloaded) == TABLE


def test_frequent_words_become_one_token() -> None:
    assert b"self" in TABLE
    assert len(encode("self")) == 1


def test_too_little_text_is_an_error_that_says_how_far_it_went() -> None:
    with pytest.raises(ValueError, match=r"only \d+ byte-pair tokens of the 5,000"):
        train_tokenizer(["abc abc"], 5_000)
    with pytest.raises(ValueError, match="only 257 byte-pair tokens"):
        train_tokenizer([], 300)


def test_a_vocabulary_without_room_for_the_bytes_is_an_error() -> None:
    assert train_tokenizer(TEXTS, 257).get_vocab_size() == 257
    with pytest.raises(ValueError, match="256 is too small"):
        train_tokenizer(TEXTS, 256)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\0", b'{"version": "1.0"}'])
def test_what_is_no_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        load_tokenizer(path)


def test_byte_fallback_vocabularies_give_bytes_and_spaces() -> None:
    vocab = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "ByteLevel": 3, "é": 4}
    sentencepiece = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    assert token_bytes(sentencepiece) == [b"<unk>", b"\n", b" the", b"ByteLevel", "é".encode()]


SPACED = st.text(st.sampled_from("ab1_é你。.,!' \n\t\r\u00a0\u2003\x1c<|>"), max_size=300)


@given(st.one_of(SPACED, st.text()), st.integers(1, 40))
@settings(max_examples=400, deadline=None)
def test_a_long_text_in_pieces_has_the_token_ids_of_the_whole(text: str, characters: int) -> None:
    pieces = list(pieces_of(TOKENIZER, text, characters))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in encode(piece)] == encode(text)


def test_pieces_are_of_the_size_asked_and_other_tokenizers_get_the_whole() -> None:
    text = "some words, and more of them.\n" * 100
    pieces = list(pieces_of(TOKENIZER, text, 64))
    assert len(pieces) > 40
    assert max(map(len, pieces)) <= 64
    joining = Tokenizer.from_str(TOKENIZER.to_str())
    joining.pre_tokenizer = pre_tokenizers.Metaspace()
    assert list(pieces_of(joining, text, 64)) == [text]


# --- text of tokens in a row -----------------------------------------------------------------------------------------


def sentencepiece_like() -> Tokenizer:
    """As Llama's: spaces as ▁, one put before the text and taken off when decoding, unknown characters as bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, max_token_length=8
    )
    made.train_from_iterator(["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"] * 3, trainer)
    return made


def metaspace() -> Tokenizer:
    """As T5's and XGLM's: the same with the library's own rule for spaces."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], show_progress=False)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    return made


KINDS = {"byte-level": TOKENIZER, "sentencepiece": sentencepiece_like(), "metaspace": metaspace()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the quick fox", "fox  the", " the", "dog 你好 the é", "x"])
def test_a_prompt_and_its_continuation_together_are_the_text_of_all_tokens(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=False)
        added = continuation(tokenizer, ids[:cut], ids[cut:])
        assert whole.endswith(added)
        if whole.startswith(before):  # not cut inside a character
            assert before + added == whole


def test_a_continuation_keeps_the_space_that_sentencepiece_drops_at_a_beginning() -> None:
    tokenizer = KINDS["sentencepiece"]
    the, fox = (tokenizer.encode(word, add_special_tokens=False).ids for word in ("the", "fox"))
    assert tokenizer.decode(fox) == "fox"
    assert tokenizer.decode([*the, *fox]) == "the fox"
    assert continuation(tokenizer, the, fox) == " fox"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_in_a_row_are_the_text_that_the_tokenizer_decodes(kind: str) -> None:
    tokenizer = KINDS[kind]
    table = token_bytes(tokenizer)
    for text in ("the quick fox", "dog  over", "lazy é 你 the" if kind != "metaspace" else "lazy"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(table[i] for i in ids).decode().removeprefix(" ") == tokenizer.decode(
            ids, skip_special_tokens=False
        )


def test_a_special_token_with_a_low_line_of_its_own_keeps_it() -> None:
    """DeepSeek's `<｜begin▁of▁sentence｜>` is written so; its tokenizer is byte-level, where ▁ is no space."""
    marked = Tokenizer.from_str(TOKENIZER.to_str())
    marked.add_special_tokens(["<｜begin▁of▁sentence｜>"])
    number = marked.get_vocab_size() - 1
    assert token_bytes(marked)[number].decode() == marked.decode([number], skip_special_tokens=False)
