"""Training dictionaries: resumable bit for bit, interruptible at any step, several in one pass over the rows.

Imports only torch, numpy and safetensors, so it runs on a bare GPU machine.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from sae.dictionary.autoencoder import SAE, fold_decoder_norms, fold_scale
from sae.dictionary.files import save
from sae.dictionary.sites import fold_site_scales
from sae.jobs.directory import claim, cut_log
from sae.jobs.progress import Interrupted, interruptible, progress
from sae.jobs.trackers import Tracker
from sae.kernels import choose, device_named, matmul
from sae.parallel.decisions import refuse_different_settings
from sae.parallel.mesh import ONE, Mesh
from sae.parallel.pace import shown_slowness, slowest_rank
from sae.training import lambda_conventions
from sae.training.begun import SETTINGS
from sae.training.config import DEFAULTS, TrainConfig
from sae.training.fixed_steps import FixedSteps
from sae.training.recipes import recipe_named
from sae.training.rows import Batch, Rows, prefetched
from sae.training.shard import save_from_shards
from sae.training.snapshots import Snapshots
from sae.training.state import TrainState, restore, save_state, start
from sae.training.state_files import INDEX, STATE, saved_header
from sae.training.step import Diverged, calibrated_threshold, check_weights, log_entry, resample_dead, train_step
from store.common import explaining_full_disk

LOG_STEPS = 25


def train(
    rows: Rows,
    out: str | Path,
    config: TrainConfig,
    *,
    provenance: dict[str, Any] | None = None,
    save_minutes: float = 2.0,
    keep: int = 1,
    kernels: str = "auto",
    device: str = "auto",
    trackers: Sequence[Tracker] = (),
    source: SAE | None = None,
    mesh: Mesh = ONE,
) -> SAE:
    """Trains a dictionary on `rows` into the directory `out`; repeat the call to resume after an interruption.

    A resumed run uses the kernels and the kind of device it began with, so that the result is the same bit for bit
    (except with `reference` kernels on a GPU, where torch adds in no fixed order). The result is on the CPU.
    Writes sae.safetensors (scale folded in), config.json, metrics.jsonl, resampled.jsonl, and state.safetensors from
    the first save on; with `keep` > 1 also earlier states as state-<step>.safetensors. `trackers` get the lines of
    metrics.jsonl (`sae.jobs.trackers`). A new run starts from the dictionary `source`, if there is one, with the same
    function on raw rows.
    On a `mesh` of several ranks each calls this with the same settings, and with `rows` that give its own part of every
    batch; rank 0 writes and logs.
    Raises: ValueError when `out` holds a run with other settings or the loss is not finite; Interrupted on Ctrl-C.
    """
    plan = Plan(Path(out), config, provenance or {}, trackers, source)
    how: dict[str, Any] = {"save_minutes": save_minutes, "keep": keep, "kernels": kernels, "device": device}
    (found,) = train_together(rows, [plan], mesh=mesh, **how)
    if isinstance(found, Diverged):
        raise found
    return found


@dataclass(frozen=True)
class Plan:
    """One dictionary to train: its directory, its settings, the origin of its rows, and what it starts from."""

    out: Path
    config: TrainConfig
    provenance: dict[str, Any]
    trackers: Sequence[Tracker] = ()
    source: SAE | None = None


def train_together(
    rows: Rows,
    plans: Sequence[Plan],
    *,
    save_minutes: float = 2.0,
    keep: int = 1,
    kernels: str = "auto",
    device: str = "auto",
    mesh: Mesh = ONE,
) -> list[SAE | Diverged]:
    """Trains several dictionaries on one pass over the rows, each bit for bit as `train` would alone.

    Their seeds and batch sizes must be those that the rows were made for. For a run that diverges the result is its
    error, and the others continue. Raises: as `train`, also for rows that are not finite.
    """
    for plan in plans:
        if not plan.config.row_filter.is_off and "row_filter" not in plan.provenance:
            raise ValueError(
                "training: max_norm_multiple, skip_positions and skip_token_ids need rows of a store or of a running "
                "model. Leave the rows out where you make them."
            )
    outs = [plan.out for plan in plans]
    with explaining_full_disk(outs[0] if len(outs) == 1 else outs[0].parent, lambda: _kept(outs)):
        for plan in plans:
            _bind(plan, mesh)
        return _train_together(rows, plans, save_minutes, keep, kernels, device, mesh)


def _bind(plan: Plan, mesh: Mesh) -> None:
    """`bind_directory` by rank 0, once all ranks are found to want the same run."""
    if mesh.world > 1:
        refuse_different_settings(mesh, {"out": str(plan.out), **plan.config.to_dict(), "rows": plan.provenance})
    mesh.on_first(lambda: bind_directory(plan.out, plan.config, plan.provenance))


def _kept(outs: Sequence[Path]) -> str:
    """What runs that stopped on a full disk continue from: of several, at least the step of the one furthest back."""
    step = min(saved_header(out).get("step", 0) for out in outs)
    return f"Everything up to step {step:,} is saved." if step else "Nothing was saved yet."


def _train_together(
    rows: Rows, plans: Sequence[Plan], save_minutes: float, keep: int, kernels: str, device: str, mesh: Mesh
) -> list[SAE | Diverged]:
    with ExitStack() as open_files, interruptible() as interrupt:
        runs = [Run(rows, plan, kernels, device, open_files, mesh) for plan in plans]
        first, last = min(run.state.step for run in runs), max(run.config.steps for run in runs)
        rows_done = sum((run.state.step - first) * run.config.batch_tokens for run in runs)
        total = sum((last - first) * run.config.batch_tokens for run in runs)
        _note(mesh, runs)
        saved, pinned = time.monotonic(), any(run.state.device.type == "cuda" for run in runs)
        with progress("train", total, "tok", initial=rows_done, shown=mesh.is_first) as bar:
            for step, (batch, waited_s) in enumerate(prefetched(rows, first, last, pinned=pinned), first):
                saving = mesh.agree(interrupt.requested or time.monotonic() - saved > 60 * save_minutes)
                for run in runs:
                    if run.state.step == step and run.unfinished:
                        shown = run.advance(batch, rows, waited_s, saving, keep)
                        bar.update(run.config.batch_tokens)
                        if shown:
                            bar.set_postfix_str(shown)
                if step == first:
                    mesh.answer_within(patient=False)
                if saving:
                    saved = time.monotonic()
                _note(mesh, runs)
                unfinished = [run for run in runs if run.unfinished]
                if not unfinished:
                    break
                if saving and mesh.agree(interrupt.requested):
                    run = unfinished[0]
                    for each in runs:
                        each.wait_until_saved()
                    raise Interrupted(
                        f"stopped at step {run.state.step:,} of {run.config.steps:,}, saved in {run.out}. "
                        "Repeat the command to continue."
                    )
        mesh.doing = ""
        with mesh.patient():
            return [run.diverged or run.finish(rows) for run in runs]


def _note(mesh: Mesh, runs: Sequence[Run]) -> None:
    """Keeps what an error of another rank will say: the step, and what is saved."""
    if mesh.world > 1:
        step, saved = (min(steps) for steps in zip(*((run.state.step, run.saved_step) for run in runs), strict=True))
        mesh.doing = f"step {step + 1:,}"
        mesh.kept = f"The state of step {saved:,} is kept in {runs[0].out}." if saved else "Nothing was saved yet."


def bind_directory(out: Path, config: TrainConfig, provenance: dict[str, Any]) -> None:
    """Makes `out` the directory of this run: writes its settings, or checks that they are those it was begun with.

    Raises: ValueError when it holds another run, or a state without settings (`sae.jobs.directory.claim`).
    """
    if ((out / STATE).exists() or (out / INDEX).exists()) and not (out / SETTINGS).exists():
        raise ValueError(
            f"{out} holds the state of a run but not its settings ({SETTINGS}): they were deleted, perhaps while "
            "it ran. Delete the directory, or choose another --out."
        )
    claim(out, SETTINGS, {"train": config.to_dict(), "rows": provenance}, absent={"train": DEFAULTS})


def saves_beside(state: TrainState) -> bool:
    """Whether training goes on while the state is written: on a GPU, where a copy of it takes little time."""
    return state.device.type == "cuda" and state.mesh.world == 1


class Run:
    """One dictionary in training: its steps, and the logging, checks, resampling and saving around them."""

    def __init__(
        self, rows: Rows, plan: Plan, kernels: str, device: str, open_files: ExitStack, mesh: Mesh = ONE
    ) -> None:
        self.out, self.config, self.provenance, self.mesh = plan.out, plan.config, plan.provenance, mesh
        self.recipe = recipe_named(plan.config.recipe)
        self.state = restore(self.out, rows, self.config, self.recipe, device, mesh) or self._start(
            rows, kernels, device, plan.source
        )
        self.log, self.events = (self._open_log(name, open_files) for name in ("metrics.jsonl", "resampled.jsonl"))
        self.reporters = [
            open_files.enter_context(tracker(self.out, self.config.to_dict(), self.state.step))
            for tracker in (plan.trackers if mesh.is_first else ())
        ]
        self.logged_at, self.logged_step, self.stall_s = time.perf_counter(), self.state.step, 0.0
        self.logged_exchange_s, self.saved_step = mesh.exchange_s, self.state.step
        self.diverged: Diverged | None = None
        self.fixed_steps = FixedSteps(self.state, self.config) if self.state.fixed_plan else None
        self.snapshots = Snapshots(self.state.device) if saves_beside(self.state) else None
        if self.snapshots:
            open_files.callback(self.snapshots.close)

    def _start(self, rows: Rows, kernels: str, device: str, source: SAE | None) -> TrainState:
        place = device_named(device)
        return start(rows, self.config, self.recipe, choose(kernels, place), place, source, self.mesh)

    def _open_log(self, name: str, open_files: ExitStack) -> TextIO:
        """A log, cut to the step from which the run continues; that of other ranks than the first goes nowhere."""
        if not self.mesh.is_first:
            return io.StringIO()
        if self.state.step:
            cut_log(self.out / name, self.state.step)
        else:
            (self.out / name).unlink(missing_ok=True)
        return open_files.enter_context((self.out / name).open("a", encoding="utf-8"))

    @property
    def unfinished(self) -> bool:
        return self.state.step < self.config.steps and not self.diverged

    def advance(self, batch: Batch, rows: Rows, waited_s: float, saving: bool, keep: int) -> str:
        """One step, then what is due: a log line, saving, resampling. Returns figures to show; ends a diverged run."""
        shown = ""
        try:
            with matmul.using(self.state.matmul):
                metrics = self._step(batch, saving)
            self.stall_s += waited_s
            if self._resamples:
                _append(self.events, resample_dead(self.state, rows, self.config, self.recipe))
                if self.fixed_steps:
                    self.fixed_steps.weights_changed()
            if self._logs:
                shown = self._report(metrics, batch.mixing)
            if saving or not self.unfinished:
                check_weights(self.state, self.config)
                with self.mesh.patient():
                    save_state(self.out, self.state, keep=keep, snapshots=self.snapshots)
                self.saved_step = self.state.step
        except Diverged as error:
            self.diverged = error
        return shown

    def _step(self, batch: Batch, saving: bool) -> dict[str, Tensor]:
        """Takes a step; its figures, or {} where nothing needs them and the device may still be at it."""
        if self.fixed_steps is None:
            return train_step(self.state, batch, self.config)
        self.fixed_steps.take(batch)
        return self.fixed_steps.settle() if saving or self._logs or self._resamples else {}

    @property
    def _logs(self) -> bool:
        return self.state.step % LOG_STEPS == 0 or not self.unfinished

    @property
    def _resamples(self) -> bool:
        return self.recipe.resample is not None and self.state.step in self.config.resample_steps

    def _report(self, metrics: dict[str, Tensor], mixing: Callable[[], float] | None) -> str:
        """Writes a line of metrics.jsonl, gives it to the trackers, and returns its main figures as text."""
        check_weights(self.state, self.config)
        entry = log_entry(metrics, self.state, self.config)
        if mixing is not None:
            entry["mixing"] = round(mixing(), 4)
        entry |= self._pace()
        _append(self.log, [entry])
        for report in self.reporters:
            report(entry)
        shown = f"fvu={entry['fvu']:.4f}, l0={entry['l0']:.1f}, dead={entry['dead_share']:.1%}"
        return shown + shown_slowness(entry)

    def _pace(self) -> dict[str, float]:
        """Rows per second since the last line, the share of that time spent waiting for rows, and the slowest rank."""
        seconds, steps, stall_s = time.perf_counter() - self.logged_at, self.state.step - self.logged_step, self.stall_s
        exchange_s = self.mesh.exchange_s - self.logged_exchange_s
        self.logged_at, self.logged_step, self.stall_s = time.perf_counter(), self.state.step, 0.0
        self.logged_exchange_s = self.mesh.exchange_s
        return {
            "rows_per_s": round(self.config.batch_tokens * steps / seconds),
            "stall_share": round(stall_s / seconds, 4),
            **slowest_rank(self.mesh, stall_s / seconds, exchange_s / seconds),
        }

    def wait_until_saved(self) -> None:
        """Returns when the last saved state is on disk. Raises: OSError if it could not be written."""
        if self.snapshots:
            self.snapshots.wait()

    def finish(self, rows: Rows) -> SAE:
        """The trained dictionary on raw rows, written next to its state, which keeps the thresholds of training."""
        self.wait_until_saved()
        sae = fold_scale(self.state.sae, self.state.scale, self.state.target_scale)
        if self.state.sites:
            sae = fold_site_scales(sae, self.state.sites)
        if self.recipe.activation == "batchtopk" and self.config.calibrate_threshold:
            with matmul.using(self.state.matmul):
                sae.threshold.copy_(calibrated_threshold(self.state, rows, self.config) / self.state.target_scale)
        if not self.recipe.unit_norm:
            sae = fold_decoder_norms(sae)
        sae.config = self._final_config()
        if self.mesh.world > 1:
            sae = save_from_shards(sae, self.mesh, self.config.d_sae, self.out, self.config.k or None)
        else:
            save(sae, self.out, sae.config)
        if (warning := self.state.penalty.missed_target()) and self.mesh.is_first:
            warnings.warn(f"{self.out}: {warning}", stacklevel=2)
        return sae.eval().requires_grad_(False)

    def _final_config(self) -> dict[str, Any]:
        """config.json: the resolved settings, and λ in every convention in use."""
        state = self.state
        return {
            "recipe": self.config.recipe,
            "train": self.config.to_dict(),
            "input_scale": state.scale,
            "kernels": state.optimizer.kernels.NAME,
            "matmul": state.matmul,
            "device": state.device.type,
            "lambda": lambda_conventions.in_every_convention(
                state.penalty.value, self.recipe.penalised, state.target_scale, state.sae.d_out
            ),
            "resample_events": state.resampled,
            **self.provenance,
        }


def _append(log: TextIO, entries: Sequence[dict[str, Any]]) -> None:
    """Writes entries as lines of JSON, so that a reader sees them at once."""
    log.writelines(json.dumps(entry) + "\n" for entry in entries)
    log.flush()
