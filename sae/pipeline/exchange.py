"""Export dictionaries to other tools, and import theirs."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sae.dictionary.autoencoder import SAE
from sae.dictionary.files import save
from sae.dictionary.sites import refuse_crosscoder
from sae.interop import hub, registry
from sae.lm import load_model
from sae.pipeline.errors import PipelineError
from sae.pipeline.resolve import opened
from store.common import explaining_full_disk

EXPORT_FORMATS = ("native", *registry.WRITERS)
IMPORT_FORMATS = tuple(registry.PEERS)


def export(sae: SAE | str | Path, format: str, out: str | Path) -> Path:
    """Writes the dictionary into `out` as `native` (sae.safetensors and config.json) or in another tool's format.

    Raises: PipelineError for an unknown format or an `out` that already holds files; InteropError if the other tool has
    no equivalent.
    """
    dictionary, _ = opened(sae)
    out = Path(out)
    if format not in EXPORT_FORMATS:
        raise PipelineError(f"export: format must be one of {', '.join(EXPORT_FORMATS)}; got {format!r}.")
    if format != "native":
        refuse_crosscoder(dictionary, f"export to {format}", PipelineError)
    refuse_filled(out, "export")
    with _whole_or_empty(out):
        if format == "native":
            return save(dictionary, out, dictionary.config)
        return registry.WRITERS[format].write(dictionary, out)


def import_dictionary(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    model: str | None = None,
    hook_point: str | None = None,
    ignore: Collection[str] = (),
) -> SAE:
    """Reads another tool's dictionary and writes it into `out` as ours, ready for eval, index, browse and steer.

    `source` is a directory, a file, or `hub:owner/repo[/path][@revision]`. `model` and `hook_point` add or correct what
    the files do not say; a model that is named is opened, checked, and recorded with the hash of its weights. `ignore`
    names settings of the other tool's configuration to leave out, which is recorded; without it, a setting that is not
    known here is refused.
    Raises: InteropError for files that are damaged or have no equivalent here; PipelineError for an `out` that holds
    files, an unknown hook point, or a model whose activations there have another width.
    """
    out = Path(out)
    refuse_filled(out, "import")
    named = str(source)
    path = hub.fetch(named) if named.startswith(hub.PREFIX) else Path(source)
    sae = registry.read(path, format, ignore)
    place = hook_point or sae.config["hook_point"]
    if place is None:
        raise PipelineError(
            f"import: {named} does not say, by a name that is known here, which activations it reads. Name the hook "
            "point as TransformerLens does: --hook-point blocks.<layer>.hook_resid_post, for example."
        )
    sae.config["hook_point"] = place
    sae.config["imported"]["source"] = named if path != Path(source) else path.resolve().name
    if model is not None:
        lm = load_model(model)
        if (width := lm.hook_width(place)) != sae.d_in:
            raise PipelineError(f"import: {model} has {width} values at {place}, the dictionary reads {sae.d_in}.")
        sae.config["model"] = lm.identity()
    with _whole_or_empty(out):
        save(sae, out, sae.config)
    return sae


@contextmanager
def _whole_or_empty(out: Path) -> Iterator[None]:
    """Empties the directory `out` again if the files cannot all be written. Raises: DiskFull when there is no room."""
    existed = out.exists()
    try:
        with explaining_full_disk(out, lambda: "Nothing of it is kept."):
            yield
    except BaseException:
        for file in out.glob("*"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        if not existed and out.exists():
            out.rmdir()
        raise


def refuse_filled(out: Path, verb: str) -> None:
    """Raises: PipelineError for an `out` that holds files."""
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise PipelineError(f"{verb}: {out} is {'a file' if out.is_file() else 'not empty'}; choose another --out.")
