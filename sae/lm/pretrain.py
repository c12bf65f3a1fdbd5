"""Trains a byte-level BPE tokenizer and a small native transformer, on a CPU in under an hour.

`state.safetensors` holds everything needed to resume; the batch of a step is a pure function of (seed, step).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.jobs.checkpoint import adam_tensors, read_header, read_tensors, restore_adam, write_tensors
from sae.jobs.directory import claim, cut_log
from sae.jobs.progress import Interrupted, interruptible, progress
from sae.lm.cross_entropy import ChunkedCrossEntropy
from sae.lm.held_out import held_out_contexts, held_out_loss, neuron_figures
from sae.lm.pretrain_config import PretrainConfig, shape_of
from sae.lm.token_stream import Repeats, TokenStream
from sae.lm.transformer import Transformer, TransformerConfig
from sae.text.sources import TextSource
from sae.text.splits import DIVIDED, WHOLE, SplitRule, rule_named
from sae.text.tokenizer import BOS, load_tokenizer, train_tokenizer
from store.common import HELD_OUT, TRAIN, atomic_write, explaining_full_disk, write_bytes, write_json

KEPT = "kept"  # the directory of copies made during training
SETTINGS = "pretrain.json"  # the settings of the run that a directory holds
MODEL = "model.safetensors"
LOSS_CONTEXTS, NEURON_CONTEXTS = 256, 64  # held-out contexts that the log measures
_DEFAULTS = asdict(PretrainConfig())
# Settings that version 0.1 did not record.
_ADDED = (
    *("block_lr_share", "keep_at", "repeat_share", "repeat_tokens", "context_bos", "attention_std"),
    *("sinusoid_positions", "document_share"),
)


def batch_loss(model: Transformer, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
    """Mean next-token loss in nats of `tokens`, in bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model.final(tokens[:, :-1])
    targets = tokens[:, 1:].flatten()
    loss: Tensor = ChunkedCrossEntropy.apply(h.flatten(0, 1), model.unembed.weight, targets)  # type: ignore[no-untyped-call]
    return loss


def learning_rate(step: int, total_steps: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine decay to `final_lr_share` of the peak."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    floor = config.final_lr_share
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def pretrain(
    source: TextSource, out: Path, *, shape: TransformerConfig, config: PretrainConfig, start: Path | None = None
) -> Path:
    """Trains tokenizer and transformer into `out` (model.safetensors, tokenizer.json, config.json, metrics.jsonl).

    With `start`, a directory of such a model, its weights and its tokenizer are where training starts; the optimizer is
    new. After an interruption, the same call continues from the last checkpoint.

    Raises: ValueError for too little text, for a `start` of another shape, or if `out` holds a run with other settings;
    Interrupted on Ctrl-C.
    """
    if start is not None and shape_of(start) != shape:
        raise ValueError(f"pretrain: {start} has the shape {shape_of(start).to_dict()}, asked for {shape.to_dict()}.")
    rule = _split_rule(out)
    settings = {
        "shape": shape.to_dict(),
        "train": asdict(config),
        "text_sha256": source.fingerprint,
        "held_out": rule.held_out,
    }
    if start is not None:
        settings["start_sha256"] = sha256((start / MODEL).read_bytes()).hexdigest()
    version_0_1 = {"train": {name: _DEFAULTS[name] for name in _ADDED}, "held_out": WHOLE.held_out}
    if shape.d_vocab > 1 << 16:
        raise ValueError(f"pretrain: d_vocab = {shape.d_vocab:,}; tokens are stored in 16 bits, so at most 65,536.")
    with explaining_full_disk(out, lambda: _kept(out)):
        claim(out, SETTINGS, settings, absent=version_0_1)
        if start is not None:
            write_bytes(out / "tokenizer.json", (start / "tokenizer.json").read_bytes())
        return _pretrain(source, out, shape, config, rule, start)


def _kept(out: Path) -> str:
    """What a run that stopped on a full disk continues from."""
    step = read_header(out / "state.safetensors").get("step", 0)
    return f"Everything up to step {step:,} is saved." if step else "Nothing was saved yet."


def _pretrain(
    source: TextSource, out: Path, shape: TransformerConfig, config: PretrainConfig, rule: SplitRule, start: Path | None
) -> Path:
    tokens = {split: _token_file(source, out, split, shape, config, rule) for split in (TRAIN, HELD_OUT)}
    if len(tokens[HELD_OUT]) <= shape.n_ctx and not (out / "state.safetensors").exists():
        raise ValueError(
            f"pretrain: the text has {len(tokens[HELD_OUT]):,} held-out tokens, too few for one context of "
            f"{shape.n_ctx} tokens to measure the loss on. Give more text, or join short documents into one file: "
            f"short documents are held out whole, one in twenty, and longer ones are divided. Delete {out} first."
        )
    model = Transformer(
        shape, seed=config.seed, attention_std=config.attention_std, sinusoid_positions=config.sinusoid_positions
    )
    if start is not None:
        model.load_state_dict(read_tensors(start / MODEL)[0])
    bos = load_tokenizer(out / "tokenizer.json").token_to_id(BOS)
    stream = TokenStream(
        tokens[TRAIN],
        shape.n_ctx,
        config.batch_contexts,
        config.seed,
        repeats=Repeats(config.repeat_share, *config.repeat_tokens),
        bos_id=bos if config.context_bos else None,
        document_share=config.document_share,
        starts=np.flatnonzero(tokens[TRAIN] == bos) if config.document_share else None,
    )
    _train(model, stream, tokens[HELD_OUT], out, config)
    batch_tokens = config.batch_contexts * shape.n_ctx
    write_model(model, out, config.context_bos, _total_steps(config, batch_tokens) * batch_tokens)
    return out


def write_model(
    model: Transformer, directory: Path, context_bos: bool = False, trained_tokens: int | None = None
) -> None:
    """Writes the weights, in 16 bits, and config.json; with tokenizer.json beside them, `load_model` opens it.

    `context_bos`: in training every context began with BOS; `trained_tokens`: how many tokens this run
    has trained it on.
    """
    write_tensors(
        directory / MODEL,
        {name: tensor.half() for name, tensor in model.state_dict().items()},
        {"kind": "native-transformer"},
    )
    settings = {"kind": "native-transformer", "format": 1, **model.config.to_dict(), "bos_token": BOS}
    settings |= {"context_bos": True} if context_bos else {}
    settings |= {} if trained_tokens is None else {"trained_tokens": trained_tokens}
    write_json(directory / "config.json", settings)


def _keep(model: Transformer, out: Path, name_tokens: int, context_bos: bool, trained_tokens: int) -> None:
    """A copy of the model as it is now, in a directory of its own."""
    directory = out / KEPT / f"{name_tokens}-tokens"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "tokenizer.json", directory / "tokenizer.json")
    write_model(model, directory, context_bos, trained_tokens)


# --- tokens ----------------------------------------------------------------------------------------------------------


def _token_file(
    source: TextSource, out: Path, split: str, shape: TransformerConfig, config: PretrainConfig, rule: SplitRule
) -> np.ndarray:
    """The split as one array `[BOS] doc [BOS] doc …`, tokenised once and stored in the run's directory."""
    path = out / f"tokens-{split}.npy"
    if not path.exists():
        tokenizer_path = out / "tokenizer.json"
        if not tokenizer_path.exists():
            first = _texts_up_to(_texts(source, TRAIN, rule), config.tokenizer_characters)
            with atomic_write(tokenizer_path) as partial:
                train_tokenizer(first, shape.d_vocab).save(str(partial))
        tokenizer = load_tokenizer(tokenizer_path)
        bos = np.array([tokenizer.token_to_id(BOS)], dtype=np.uint16)
        parts: list[np.ndarray] = []
        texts = _texts(source, split, rule)
        while batch := list(islice(texts, 256)):
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                parts += [bos, np.array(encoding.ids, dtype=np.uint16)]
        with atomic_write(path) as partial, partial.open("wb") as file:
            _write_npy(file, np.concatenate(parts) if parts else np.empty(0, np.uint16))
    tokens: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return tokens


def _write_npy(file: BinaryIO, tokens: np.ndarray) -> None:
    """As numpy.save, which does not say why a write failed when the disk is full."""
    header = np.lib.format.header_data_from_array_1_0(tokens)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(tokens.data)


def _split_rule(out: Path) -> SplitRule:
    """The rule that a run was started with, so that it continues with the same text; for a new run, today's."""
    if not (out / SETTINGS).exists():
        return DIVIDED
    try:
        return rule_named(json.loads((out / SETTINGS).read_text(encoding="utf-8")).get("held_out", WHOLE.held_out))
    except (json.JSONDecodeError, AttributeError):  # damaged: refused when it is claimed
        return DIVIDED


def _texts(source: TextSource, split: str, rule: SplitRule) -> Iterator[str]:
    for document in source.documents():
        yield from rule.texts(document).get(split, ())


def _texts_up_to(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters < 0:
            return


# --- loop ------------------------------------------------------------------------------------------------------------


def _train(model: Transformer, stream: TokenStream, held_out: np.ndarray, out: Path, config: PretrainConfig) -> None:
    batch_tokens = config.batch_contexts * model.config.n_ctx
    total_steps = _total_steps(config, batch_tokens)
    names, optimizer = _optimizer(model, config)
    step = _restore(model, optimizer, names, out)
    keep_steps = {-(-tokens // batch_tokens): tokens for tokens in sorted(config.keep_at, reverse=True)}
    if step == 0 and 0 in keep_steps:
        _keep(model, out, keep_steps[0], config.context_bos, 0)
    saved = time.monotonic()
    with (
        interruptible() as interrupt,
        progress("pretrain", total_steps * batch_tokens, "tok", initial=step * batch_tokens) as bar,
        (out / "metrics.jsonl").open("a", encoding="utf-8") as log,
    ):
        while step < total_steps:
            lr = learning_rate(step, total_steps, config)
            loss = _step(model, optimizer, stream.batch(step), lr, config.clip_norm)
            step += 1
            if not math.isfinite(loss):
                raise ValueError(
                    f"pretrain: the loss is {loss} at step {step}. Lower lr (now {config.lr:g}) and start a new run."
                )
            bar.update(batch_tokens)
            if step in keep_steps:
                _keep(model, out, keep_steps[step], config.context_bos, step * batch_tokens)
            if step % 50 == 0 or step == total_steps:
                entry: dict[str, Any] = {"step": step, "tokens": step * batch_tokens, "loss": round(loss, 4), "lr": lr}
                if step % config.eval_steps == 0 or step == total_steps:
                    entry |= _held_out_figures(model, held_out)
                log.write(json.dumps(entry) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{loss:.3f}")
            if interrupt.requested or time.monotonic() - saved > 60 * config.save_minutes or step == total_steps:
                _save(model, optimizer, names, out, step)
                saved = time.monotonic()
            if interrupt.requested and step < total_steps:
                raise Interrupted(
                    f"stopped at step {step:,} of {total_steps:,}, saved in {out}. Repeat the command to continue."
                )


def _total_steps(config: PretrainConfig, batch_tokens: int) -> int:
    return max(1, config.train_tokens // batch_tokens)


def _optimizer(model: Transformer, config: PretrainConfig) -> tuple[list[str], torch.optim.AdamW]:
    """AdamW with weight decay on matrices and the blocks' own learning rate, and the parameters' names in its order."""
    groups: dict[tuple[bool, bool], dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.ndim <= 1, name.startswith("blocks.")), {})[name] = parameter
    ordered = sorted(groups.items())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": list(group.values()),
                "weight_decay": 0.0 if is_vector else config.weight_decay,
                "lr_share": config.block_lr_share if in_block else 1.0,
            }
            for (is_vector, in_block), group in ordered
        ],
        lr=config.lr,
        betas=config.betas,
        fused=True,
    )
    return [name for _, group in ordered for name in group], optimizer


def _step(model: Transformer, optimizer: torch.optim.Optimizer, tokens: Tensor, lr: float, clip_norm: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]
    loss = batch_loss(model, tokens)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def _held_out_figures(model: Transformer, tokens: np.ndarray) -> dict[str, Any]:
    """What the log says of the held-out tokens: the loss, and how sparse the neurons of each MLP layer are."""
    contexts = held_out_contexts(tokens, model.config.n_ctx, LOSS_CONTEXTS)
    neurons = neuron_figures(model, held_out_contexts(tokens, model.config.n_ctx, NEURON_CONTEXTS))
    return {"held_out_loss": round(held_out_loss(model, contexts), 4)} | ({"neurons": neurons} if neurons else {})


def _save(model: Transformer, optimizer: torch.optim.Optimizer, names: list[str], out: Path, step: int) -> None:
    parameters = {f"model.{n}": p for n, p in model.named_parameters()}
    write_tensors(out / "state.safetensors", parameters | adam_tensors(optimizer, names), {"step": step})


def _restore(model: Transformer, optimizer: torch.optim.Optimizer, names: list[str], out: Path) -> int:
    """Loads the last checkpoint, cuts metrics.jsonl to its step, and returns the step; 0 without a checkpoint."""
    if not (out / "state.safetensors").exists():
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return 0
    tensors, header = read_tensors(out / "state.safetensors")
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    restore_adam(optimizer, names, tensors)
    cut_log(out / "metrics.jsonl", header["step"])
    return int(header["step"])
