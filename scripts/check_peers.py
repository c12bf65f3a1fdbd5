"""Checks exports and imports with the peers' own packages, in both directions, to 1e-5.

    python scripts/check_peers.py DIR [--peer NAME …] [--sae TRAINED_DIR …] [--torch SPEC] [--package NAME=SPEC …]

Each peer gets its own environment in DIR, installed from PyPI once; DIR also keeps the files exchanged.
Dictionaries of every activation, random and (--sae) trained, are exported; the peer's package loads them and computes
activations on the same rows. Dictionaries that the package makes and saves are imported and computed by ours. Feature
pages are read by SAEDashboard's own classes. Prints a table, one row per exchange, and writes it to DIR/table.md. A
peer that cannot be installed is reported as not checked.
Exit status: 0 if all checked peers agree, 1 if one differs, 2 if none could be checked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import load
from sae.interop import registry
from sae.interop.files import InteropError
from sae.pipeline import PAGE_FORMATS, export_pages
from store.common import DocumentRecord
from store.features import FeatureWriter

SIDES = Path(__file__).resolve().parent / "peers"
D_IN, D_SAE, K, ROWS = 24, 96, 6, 512
TOLERANCE = 1e-5  # relative to the largest value if that is above 1


@dataclass(frozen=True)
class Peer:
    """How to install a peer and ask it; `layout` is its name in sae.interop."""

    layout: str
    package: str
    side: str
    pinned: tuple[str, ...] = ()  # versions that pip must choose, or the package does not import
    uninstalled: tuple[str, ...] = ()  # dependencies with which the package does not import
    alone: bool = False  # whether what is asked of the package needs numpy only, and not its many dependencies


PEERS = {
    "sae-lens": Peer("sae-lens", "sae-lens", "ask_saelens.py"),
    "dictionary-learning": Peer(
        "dictionary-learning",
        "dictionary-learning",
        "ask_dictionary_learning.py",
        uninstalled=("torchvision",),  # PyPI's build does not load with a torch without CUDA; nothing here needs it
    ),
    "sparsify": Peer("sparsify", "eai-sparsify", "ask_sparsify.py"),
    "llamascopium": Peer(
        "llamascopium",
        "llamascopium",
        "ask_llamascopium.py",
        pinned=("transformer-lens<4",),  # it imports HookedTransformer, which 4.0 removed
    ),
    "sae-dashboard": Peer("sae-dashboard", "sae-dashboard", "ask_sae_dashboard.py", alone=True),
    "openai": Peer("openai", "git+https://github.com/openai/sparse_autoencoder", "ask_openai.py"),
}


@dataclass(frozen=True)
class Row:
    """One exchange: the largest absolute differences, or the problem that prevented it."""

    peer: str
    direction: str
    case: str
    encode: float | None = None
    decode: float | None = None
    largest: float = 1.0
    problem: str | None = None

    @property
    def agrees(self) -> bool:
        return self.problem is None and max(self.encode or 0.0, self.decode or 0.0) <= TOLERANCE * self.largest

    @property
    def is_fine(self) -> bool:
        """It agrees, or it is an export that our writer refuses with a reason. (An import must not be refused.)"""
        return self.agrees or (self.direction == "write" and (self.problem or "").startswith("refused: "))

    def __str__(self) -> str:
        figures = f"{self.encode:.1e} | {self.decode:.1e}" if self.encode is not None else "– | –"
        said = self.problem or ("agrees" if self.agrees else "DIFFERS")
        return f"| {self.peer} | {self.direction} | {self.case} | {figures} | {said} |"


# --- environments ----------------------------------------------------------------------------------------------------


def environment(directory: Path, peer: Peer, package: str, torch_spec: str) -> tuple[Path | None, str]:
    """The Python of an environment with this package, installed if necessary; None and the reason if that fails."""
    python = directory / "bin" / "python"
    stamp = directory / "installed"
    wanted = [torch_spec, "safetensors", package, *peer.pinned]
    if stamp.is_file() and stamp.read_text() == " ".join(wanted):
        return python, ""
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    installs = [["--no-deps", package], ["numpy"]] if peer.alone else [wanted]
    for arguments in installs:
        done = subprocess.run([*pip, "install", "--retries", "1", *arguments], capture_output=True, text=True)
        if done.returncode:
            break
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or ["pip failed"]
        return None, lines[-1].strip()
    if peer.uninstalled:
        subprocess.run([*pip, "uninstall", "--yes", *peer.uninstalled], check=True, capture_output=True)
    stamp.write_text(" ".join(wanted))
    return python, ""


# --- our side --------------------------------------------------------------------------------------------------------


def random_dictionary(
    activation: str, seed: int, *, unit_norms: bool = True, pre_bias: bool = True, row_norm: str | None = None
) -> SAE:
    """A dictionary whose features fire on rows around its decoder bias."""
    k = K if activation in ("topk", "batchtopk") else None
    sae = SAE(D_IN, D_SAE, activation=activation, k=k, pre_bias=pre_bias, row_norm=row_norm).eval()
    g = torch.Generator().manual_seed(seed)
    values = {
        "W_dec": torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=-1),
        "b_enc": -0.2 * torch.rand(D_SAE, generator=g),
        "b_dec": torch.randn(D_IN, generator=g),
        "threshold": 0.5 * torch.rand(D_SAE, generator=g),
        "r_mag": 0.3 * torch.randn(D_SAE, generator=g),
        "b_mag": 0.1 * torch.randn(D_SAE, generator=g),
    }
    if activation == "batchtopk":
        values["threshold"] = torch.full((D_SAE,), 0.4)
    values["W_enc"] = values["W_dec"].T + 0.05 * torch.randn(D_IN, D_SAE, generator=g)
    if not unit_norms:
        norms = 0.5 + 1.5 * torch.rand(D_SAE, generator=g)
        values["W_dec"], values["W_enc"] = values["W_dec"] * norms[:, None], values["W_enc"] / norms
    for name, tensor in sae.tensors().items():
        tensor.copy_(values[name])
    sae.config = {"recipe": "random", "hook_point": "blocks.0.mlp.hook_post", "model": {"id": "tiny-relu-1l"}}
    return sae.requires_grad_(False)


def dictionaries(trained: list[Path]) -> dict[str, SAE]:
    made = {
        activation: random_dictionary(activation, i)
        for i, activation in enumerate(("relu", "topk", "batchtopk", "jumprelu", "gated"))
    }
    made["relu, free norms"] = random_dictionary("relu", 10, unit_norms=False)
    made["topk, free norms"] = random_dictionary("topk", 11, unit_norms=False)
    made["relu, no pre-bias"] = random_dictionary("relu", 12, pre_bias=False)
    made["jumprelu, no pre-bias"] = random_dictionary("jumprelu", 13, pre_bias=False)
    for i, row_norm in enumerate(("layer_norm", "unit_mean_square")):
        made[f"topk, {row_norm}"] = random_dictionary("topk", 14 + i, row_norm=row_norm)
    return made | {f"trained {path.name}": load(path) for path in trained}


def rows_for(sae: SAE) -> torch.Tensor:
    """Rows around the decoder bias, large enough that features fire, some alone and some together."""
    g = torch.Generator().manual_seed(0)
    on = torch.rand(ROWS, sae.d_sae, generator=g) < 8 / sae.d_sae
    features = torch.rand(ROWS, sae.d_sae, generator=g) * on
    return sae.b_dec + 2 * features @ sae.W_dec + 0.3 * torch.randn(ROWS, sae.d_in, generator=g)


def computed(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sae.encode(x), sae.reconstruct(x)


def compare(peer: str, direction: str, case: str, sae: SAE, x: torch.Tensor, answers: dict[str, torch.Tensor]) -> Row:
    acts, x_hat = computed(sae, x)
    if not (acts > 0).any():
        return Row(peer, direction, case, problem="no feature fires: nothing was compared")
    largest = max(1.0, acts.abs().max().item(), x_hat.abs().max().item())
    encode, decode = ((a - b).abs().max().item() for a, b in ((acts, answers["acts"]), (x_hat, answers["x_hat"])))
    return Row(peer, direction, case, encode, decode, largest)


# --- exchange --------------------------------------------------------------------------------------------------------


def check(name: str, python: Path, work: Path, ours: dict[str, SAE]) -> tuple[list[Row], str]:
    """Every exchange with one peer, and the versions it reports."""
    peer = PEERS[name]
    shutil.rmtree(work, ignore_errors=True)
    if peer.layout in PAGE_FORMATS:
        return check_pages(name, python, work)
    (work / "exported").mkdir(parents=True)
    rows: list[Row] = []
    for case, sae in ours.items() if peer.layout in registry.WRITERS else ():
        directory = work / "exported" / case
        try:
            registry.WRITERS[peer.layout].write(sae, directory)
        except InteropError as error:
            rows.append(Row(name, "write", case, problem=f"refused: {error}"))
            continue
        save_file({"x": rows_for(sae)}, directory.with_name(f"{case}.rows.safetensors"))
    done = subprocess.run([python, SIDES / peer.side, work], capture_output=True, text=True)
    if done.returncode:
        return [Row(name, "–", "–", problem=f"its side failed: {done.stderr.strip().splitlines()[-1]}")], "?"
    versions = json.loads(done.stdout.strip().splitlines()[-1])
    for directory in sorted(p for p in (work / "exported").glob("*") if p.is_dir()):
        rows.append(written(name, directory, ours[directory.name]))
    for directory in sorted(p for p in (work / "made").glob("[!.]*") if p.is_dir()):
        rows.append(imported(name, directory, peer.layout))
    return rows, f"{versions['version']} (torch {versions['torch']}, Python {versions['python']})"


def check_pages(name: str, python: Path, work: Path) -> tuple[list[Row], str]:
    """Feature pages, read by the peer into its own classes: what those hold must be what was written."""
    index = made_up_index(work / "features.zarr")
    directory = export_pages(index, work / "pages" / "made up")
    done = subprocess.run([python, SIDES / PEERS[name].side, work], capture_output=True, text=True)
    if done.returncode:
        return [Row(name, "–", "–", problem=f"its side failed: {done.stderr.strip().splitlines()[-1]}")], "?"
    ours = [json.loads(file.read_text()) for file in sorted(directory.glob("batch-*.json"))]
    theirs = json.loads(directory.with_name(f"{directory.name}.read.json").read_text())
    row = Row(name, "write", f"{sum(len(batch['features']) for batch in ours)} feature pages", 0.0, 0.0)
    versions = json.loads(done.stdout.strip().splitlines()[-1])
    if ours != theirs:
        row = Row(name, "write", row.case, problem="the peer reads something else than was written")
    return [row], f"{versions['version']} (Python {versions['python']})"


def made_up_index(path: Path) -> Path:
    """A feature index of random firings over random tokens, some of them bytes of incomplete characters."""
    rng = np.random.default_rng(0)
    contexts, seq_len, d_sae = 20, 32, 70
    vocabulary = [f" token{i}".encode() for i in range(200)] + [bytes([0xC3]), "é".encode(), b"<script>"]
    writer = FeatureWriter(
        path,
        d_sae=d_sae,
        seq_len=seq_len,
        n_contexts=contexts,
        attributes={"d_in": 8, "hook_point": "blocks.3.hook_resid_post", "model": "gpt2-small", "sae": "made up"},
        vocabulary=vocabulary,
        documents=[DocumentRecord("a", "made up", "prose", "0" * 64)],
    )
    tokens = rng.integers(0, len(vocabulary), (contexts, seq_len))
    keep = np.ones(tokens.shape, bool)
    keep[:, 0] = False
    acts = rng.exponential(1.0, (contexts * seq_len, d_sae)) * (rng.random((contexts * seq_len, d_sae)) < 0.05)
    acts[~keep.reshape(-1)] = 0.0
    rows, features = np.nonzero(acts)
    writer.append(0, tokens, keep, np.zeros(tokens.shape, np.int64), rows, features, acts[rows, features])
    top = rng.integers(0, len(vocabulary), (d_sae, 20)).astype(np.int32)
    values = rng.normal(size=(d_sae, 20)).astype(np.float32)
    sides = {
        f"logits/{side}_{part}": array for side in ("top", "bottom") for part, array in (("id", top), ("value", values))
    }
    return writer.finish(sides)


def written(name: str, directory: Path, sae: SAE) -> Row:
    error = directory.with_name(f"{directory.name}.error.txt")
    if error.is_file():
        return Row(name, "write", directory.name, problem=f"the peer cannot load it: {error.read_text()}")
    x = load_file(directory.with_name(f"{directory.name}.rows.safetensors"))["x"]
    answers = load_file(directory.with_name(f"{directory.name}.answers.safetensors"))
    return compare(name, "write", directory.name, sae, x, answers)


def imported(name: str, directory: Path, layout: str) -> Row:
    answers = load_file(directory.with_name(f"{directory.name}.answers.safetensors"))
    inside = list(directory.iterdir())
    try:  # as for a user: the layout is detected
        sae = registry.read(inside[0] if layout == "openai" else directory)
    except InteropError as error:
        return Row(name, "read", directory.name, problem=f"refused: {error}")
    return compare(name, "read", directory.name, sae, answers["x"], answers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, help="directory for environments and files")
    parser.add_argument("--peer", action="append", choices=PEERS, help="may repeat (default: all)")
    parser.add_argument("--sae", action="append", type=Path, default=[], help="a trained dictionary to export too")
    parser.add_argument("--torch", default="torch", help="what pip installs as torch, e.g. a CPU build")
    parser.add_argument("--package", action="append", default=[], metavar="NAME=SPEC", help="what pip installs instead")
    args = parser.parse_args()
    packages = dict(item.split("=", 1) for item in args.package)
    ours = dictionaries(args.sae)
    rows: list[Row] = []
    lines = []
    for name in args.peer or PEERS:
        package = packages.get(name, PEERS[name].package)
        print(f"{name}: environment with {package}", file=sys.stderr)
        python, problem = environment(args.dir / name, PEERS[name], package, args.torch)
        if python is None:
            lines.append(f"- {name}: could not be installed ({problem})")
            continue
        found, versions = check(name, python, args.dir / "exchange" / name, ours)
        rows += found
        lines.append(f"- {name}: {versions}")
    header = "| peer | direction | dictionary | encode | decode | |\n|---|---|---|---|---|---|"
    table = "\n".join([*lines, "", header, *map(str, rows)])
    print(table)
    args.dir.mkdir(parents=True, exist_ok=True)
    (args.dir / "table.md").write_text(table + "\n")
    if not rows:
        return 2
    proven = {row.peer for row in rows if row.agrees} == {row.peer for row in rows}
    return 0 if proven and all(row.is_fine for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
