r"""Trains a model so that its facts pass through one place, by interchange, and a twin that reads the same without it.

    python scripts/plant_site.py tasks-4l --out lm/planted --layer 1
    python scripts/plant_site.py tasks-4l --out lm/twin --layer 1 --twin
    sae lens facts lm/planted --method swap

In each step the MLP output of `--layer` at the last token of a subject is put in the place of that of another subject,
whatever relation is asked for, and the model learns to answer about the subject that it was taken from. A place
that decides the answer is then known, and causal tracing must find it. The twin learns to answer the same questions,
and nothing is put anywhere: what tracing finds there has another reason than more training. Ordinary text is trained on
in both. Sentences that are held out stay so.
Source of interchange training: Geiger et al. 2022, arXiv 2112.00826.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from sae.circuits.tasks import facts_in_tokens, single_token
from sae.circuits.world import PREFIXES, as_document, documents, fact_prompt
from sae.jobs.progress import progress
from sae.lm import NativeModel, load_model
from sae.lm.pretrain import batch_loss, learning_rate, write_model
from sae.lm.pretrain_config import PretrainConfig
from sae.lm.token_stream import TokenStream
from sae.lm.transformer import Transformer
from store.common import TRAIN


@dataclass(frozen=True, eq=False)
class Questions:
    """All questions about facts that are not held out; `answers` are by subject and relation."""

    tokens: Int[Tensor, "question pos"]
    subject_ends: Int[Tensor, " question"]
    ends: Int[Tensor, " question"]
    subjects: Int[Tensor, " question"]
    relations: Int[Tensor, " question"]
    answers: Int[Tensor, "subject relation"]

    def right(self, chosen: Int[Tensor, " batch"], of: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """What these questions ask, about the subjects of the questions `of`; −1 where the world does not say."""
        return self.answers[self.subjects[of], self.relations[chosen]]


def questions_of(lm: NativeModel) -> Questions:
    known = facts_in_tokens(lm)
    subjects = {name: i for i, name in enumerate(dict.fromkeys(subject for subject, _ in known))}
    relations = {name: i for i, name in enumerate(dict.fromkeys(relation for _, relation in known))}
    answers = torch.full((len(subjects), len(relations)), -1)
    rows, about = [], []
    for (subject, relation), word in known.items():
        answers[subjects[subject], relations[relation]] = single_token(lm, f" {word}")
        for prompt in (fact_prompt(subject, relation, way, prefix) for way in (0, 1) for prefix in PREFIXES):
            if as_document(f"{prompt} {word}").split == TRAIN:
                ids = lm.encode_prompt(prompt)
                subject_end = len(lm.encode_prompt(prompt[: prompt.index(subject) + len(subject)])) - 1
                rows.append(ids)
                about.append((subject_end, len(ids) - 1, subjects[subject], relations[relation]))
    longest = max(map(len, rows))
    tokens = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in rows])
    subject_ends, ends, whose, asked = torch.tensor(about).unbind(1)
    return Questions(tokens, subject_ends, ends, whose, asked, answers)


def interchange_loss(
    model: Transformer, questions: Questions, asked: Int[Tensor, " batch"], layer: int, twin: bool
) -> tuple[Tensor, float]:
    """Cross-entropy of the answers about the subjects that were put in, in nats, and the share that is likeliest.

    Each question gets the value of the one before it: up to the place nothing is changed, so one run has them all.
    """
    row, place, source = torch.arange(len(asked)), f"blocks.{layer}.hook_mlp_out", asked.roll(1)
    at = questions.subject_ends[asked]

    def put(name: str, value: Tensor) -> Tensor:
        return value.index_put((row, at), value[row, at].roll(1, 0)) if name == place else value

    logits = model(questions.tokens[asked]) if twin else model(questions.tokens[asked], put)
    last = logits[row, questions.ends[asked]]
    right = questions.right(asked, asked if twin else source)
    return F.cross_entropy(last, right, ignore_index=-1), float((last.argmax(-1) == right).float().mean())


def text_tokens(lm: NativeModel, n: int) -> Int[np.ndarray, " tokens"]:
    """`[BOS] sentence [BOS] sentence …`, without those that are held out."""
    texts = [document.text for document in documents(n) if document.split == TRAIN]
    encoded = lm.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([lm.bos_id, *each.ids], np.uint16) for each in encoded])


def train(lm: NativeModel, layer: int, steps: int, lr: float, batch: int, seed: int, twin: bool) -> Sequence[float]:
    """Trains in place; returns the share of right answers of every step."""
    model, questions = lm.module, questions_of(lm)
    model.requires_grad_(True)
    tokens = text_tokens(lm, 40_000)
    stream = TokenStream(
        tokens, model.config.n_ctx, batch // 8, seed, document_share=0.9, starts=np.flatnonzero(tokens == lm.bos_id)
    )
    config = PretrainConfig(lr=lr, warmup_steps=50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    generator, right = torch.Generator().manual_seed(seed), list[float]()
    with torch.inference_mode(False), torch.enable_grad(), progress("plant", steps, "step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config)
            text = stream.batch(step)
            chosen = torch.randint(len(questions.tokens), (batch,), generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, share = interchange_loss(model, questions, chosen, layer, twin)
            text_loss = batch_loss(model, text)
            optimizer.zero_grad()
            (text_loss + loss).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right.append(share)
            bar.update(1)
            bar.set_postfix(text=f"{text_loss.item():.3f}", loss=f"{loss.item():.3f}", right=f"{share:.2f}")
    model.requires_grad_(False)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model that knows the made-up world, of `sae pretrain`")
    parser.add_argument("--out", type=Path, required=True, help="directory of the new model")
    parser.add_argument("--layer", type=int, default=1, help="layer of the place (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="steps of training (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=96, help="questions of a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    parser.add_argument("--twin", action="store_true", help="the control: the same questions, nothing put anywhere")
    args = parser.parse_args()
    lm = load_model(args.model, device="cpu")
    if not isinstance(lm, NativeModel):
        parser.error(f"{args.model} is not a model of `sae pretrain`")
    begun = time.process_time()
    right = train(lm, args.layer, args.steps, args.lr, args.batch, args.seed, args.twin)
    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lm.directory / "tokenizer.json", args.out / "tokenizer.json")
    write_model(lm.module, args.out)
    end = right[-100:]
    print(
        f"right in the last {len(end)} steps: {sum(end) / len(end):.3f}; {time.process_time() - begun:.0f} CPU seconds"
    )
    print(args.out)


if __name__ == "__main__":
    main()
