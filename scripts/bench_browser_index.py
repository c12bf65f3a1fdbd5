"""Makes a dictionary and an index of any size in minutes, from real text, made-up directions and made-up firings.

    python scripts/bench_browser_index.py /tmp/bench-browser --text PATH --tokens 1000000 --d-sae 16384

Of the 20 features on a token, ten are a hash of the token and ten a hash of it and the previous token, so that features
differ in density and specificity as learned ones do. Everything else is the real code: the writer, logit weights,
neighbours, co-activation, rules, Δloss, the map.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.indexing import ablation_effects, co_activation, rules
from sae.indexing.build import weight_panels
from sae.lm import NativeModel, load_model
from sae.text.sources import open_text
from sae.text.tokenizer import token_bytes
from store.features import FeatureWriter

HOOK_POINT, MODEL, SEQ_LEN = "blocks.0.mlp.hook_post", "tiny-relu-1l", 256
PER_TOKEN = 10  # features chosen by the token, and as many by the pair
CONTEXTS_AT_ONCE = 64


def contexts(model: NativeModel, text: str, n: int) -> Iterator[tuple[np.ndarray, str, str]]:
    """Token ids [SEQ_LEN] of `n` contexts of one document each, BOS first, with the document's id and domain."""
    for document in open_text(text).documents():
        ids = model.encode_prompt(document.text)[1:]
        for start in range(0, len(ids) - SEQ_LEN + 2, SEQ_LEN - 1):
            yield np.array([model.bos_id, *ids[start : start + SEQ_LEN - 1]]), document.id, document.domain
            n -= 1
            if not n:
                return
    raise SystemExit(f"{text}: too little text, {n:,} more contexts of {SEQ_LEN} tokens are needed")


def firings(tokens: np.ndarray, d_sae: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, feature, value) of the made-up activations of contexts [n, SEQ_LEN]."""
    previous = np.roll(tokens, 1, axis=1).astype(np.uint64)
    seeds = [tokens.astype(np.uint64), tokens.astype(np.uint64) + (previous + np.uint64(1) << np.uint64(20))]
    rows, features, values = [], [], []
    for seed in seeds:
        for number in range(PER_TOKEN):
            mixed = (seed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(number + 1)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed ^= mixed >> np.uint64(31)
            share = (mixed >> np.uint64(11)).astype(np.float64) / 2**53
            rows.append(np.arange(tokens.size))
            features.append((share.reshape(-1) ** 2 * d_sae).astype(np.int64))  # low numbers are denser
            values.append(0.5 + 3 * ((mixed.reshape(-1) % np.uint64(997)).astype(np.float32) / 997))
    row, feature, value = map(np.concatenate, (rows, features, values))
    _, first = np.unique(row * d_sae + feature, return_index=True)
    jitter = np.random.default_rng(len(tokens)).gamma(4.0, 0.25, len(first))
    return row[first], feature[first], (value[first] * jitter).astype(np.float32) + 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="directory of runs to make")
    parser.add_argument("--text", default="default", help="text of the index")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of the index")
    parser.add_argument("--d-sae", type=int, default=16_384, help="number of features")
    args = parser.parse_args()
    out, n = args.root / "made-up" / "wide", args.tokens // SEQ_LEN
    model = load_model(MODEL)
    assert isinstance(model, NativeModel)
    torch.manual_seed(0)
    sae = SAE(model.module.config.d_mlp, args.d_sae, activation="topk", k=2 * PER_TOKEN)
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(args.d_sae, sae.d_in), dim=-1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.requires_grad_(False)
    found = list(contexts(model, args.text, n))
    tokens = np.stack([ids for ids, _, _ in found])
    names = {name: (number, domain) for number, (name, domain) in enumerate({f[1]: f[2] for f in found}.items())}
    document = np.array([names[name][0] for _, name, _ in found])[:, None].repeat(SEQ_LEN, 1)
    keep = tokens != model.bos_id
    writer = FeatureWriter(
        out / "features.zarr",
        d_sae=args.d_sae,
        seq_len=SEQ_LEN,
        n_contexts=n,
        attributes={"d_in": sae.d_in, "hook_point": HOOK_POINT, "model": model.id, "bos": model.bos_id},
        vocabulary=token_bytes(model.tokenizer, model.d_vocab),
        documents=[(name, "", domain, "") for name, (_, domain) in names.items()],
    )
    for start in range(0, n, CONTEXTS_AT_ONCE):
        part = slice(start, min(n, start + CONTEXTS_AT_ONCE))
        row, feature, value = firings(tokens[part], args.d_sae)
        kept = keep[part].reshape(-1)[row]
        writer.append(
            start, tokens[part], keep[part], document[part], row[kept] + start * SEQ_LEN, feature[kept], value[kept]
        )
    writer.finish(
        weight_panels(sae, model, HOOK_POINT),
        lambda made: (
            co_activation.panels(made) | rules.panels(made) | ablation_effects.panels(sae, model, made, HOOK_POINT)
        ),
    )
    save(sae, out, {"recipe": "made up", "hook_point": HOOK_POINT, "model": model.identity()})
    print(out)


if __name__ == "__main__":
    main()
