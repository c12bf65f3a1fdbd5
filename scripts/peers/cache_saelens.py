"""SAELens' side of scripts/bench_data.py: its own runner caches the same model's activations on the same contexts.

    python cache_saelens.py MODEL_DIRECTORY CONTEXTS.safetensors HOOK OUT

The contexts are tokenised already, so that only the model and the disk are timed; float16 on disk, not shuffled. Prints
one line of JSON: seconds, processor seconds, rows, and the mean activation, which shows that the models are the same.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import sae_lens.cache_activations_runner as runner
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig


def hooked(directory: Path, seq_len: int) -> HookedTransformer:
    """The native one-layer model in the form that SAELens takes."""
    config = json.loads((directory / "config.json").read_text())
    names = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn")
    cfg = HookedTransformerConfig(**{n: config[n] for n in names}, n_ctx=config["n_ctx"], normalization_type="LN")
    model, w = HookedTransformer(cfg), {k: v.float() for k, v in load_file(directory / "model.safetensors").items()}
    by_head = (cfg.n_heads, cfg.d_head, cfg.d_model)
    state = dict(model.state_dict())
    state |= {"embed.W_E": w["embed.weight"], "pos_embed.W_pos": w["pos_embed.weight"]}
    state |= {
        "unembed.W_U": w["unembed.weight"].T,
        "ln_final.w": w["ln_final.weight"],
        "ln_final.b": w["ln_final.bias"],
    }
    for layer in range(cfg.n_layers):
        b = f"blocks.{layer}."
        for n in "qkv":
            state[f"{b}attn.W_{n.upper()}"] = w[f"{b}attn.{n}.weight"].view(by_head).transpose(1, 2)
            state[f"{b}attn.b_{n.upper()}"] = w[f"{b}attn.{n}.bias"].view(cfg.n_heads, cfg.d_head)
        state[f"{b}attn.W_O"] = w[f"{b}attn.o.weight"].T.reshape(cfg.n_heads, cfg.d_head, cfg.d_model)
        state[f"{b}attn.b_O"] = w[f"{b}attn.o.bias"]
        for n in ("in", "out"):
            state |= {f"{b}mlp.W_{n}": w[f"{b}mlp.{n}.weight"].T, f"{b}mlp.b_{n}": w[f"{b}mlp.{n}.bias"]}
        for n in ("ln1", "ln2"):
            state |= {f"{b}{n}.w": w[f"{b}{n}.weight"], f"{b}{n}.b": w[f"{b}{n}.bias"]}
    model.load_state_dict(state)
    return model.eval()


def main() -> None:
    directory, contexts, hook, out = sys.argv[1:]
    tokens = load_file(contexts)["tokens"].long().numpy()
    model = hooked(Path(directory), tokens.shape[1])
    runner.load_model = lambda **_: model
    cfg = runner.CacheActivationsRunnerConfig(
        dataset_path="contexts",
        model_name="native",
        model_batch_size=16,
        hook_name=hook,
        d_in=model.cfg.d_mlp,
        training_tokens=tokens.size,
        context_size=tokens.shape[1],
        new_cached_activations_path=out,
        shuffle=False,
        dtype="float16",
        device="cpu",
        prepend_bos=False,
        streaming=False,
        buffer_size_gb=0.25,
    )
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    caching = runner.CacheActivationsRunner(cfg, override_dataset=dataset)
    began, used = time.perf_counter(), time.process_time()
    found = caching.run()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - used
    first = torch.from_numpy(np.array(found[:4][hook], dtype=np.float32))
    rows = len(found) * tokens.shape[1]
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "rows": rows, "mean_activation": first.mean().item()}))


if __name__ == "__main__":
    main()
