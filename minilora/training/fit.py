"""Training with files: a run in its folder, with its log, checkpoints and result.

A run that ends for any reason can be resumed, to the same bits as without the interruption.
"""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from minilora.io.loading import BASE_FOLDER
from minilora.training import best, checkpoints
from minilora.training.batching import batches_of
from minilora.training.card import write_for_readers
from minilora.training.checkpoints import TrainState
from minilora.training.evaluate import mean_loss
from minilora.training.loop import Diverged, check_loss, train_steps
from minilora.training.result import write_base, write_result, writes_own_base
from minilora.training.run import Run
from minilora.training.run_folder import LOG, cut_log, lock_folder, log_line, open_folder, read_log
from minilora.training.threads import blas_threads

LEARNS = 10
"""From so many steps on a run must have lowered the loss of what it was trained on."""

CHECKED = 8
"""After the last step the loss is computed once more, on the first micro-batch of this many
examples: no later step would notice that the last one diverged."""

Watch = Callable[[Mapping[str, Any], int], None]
"""Called with each line of the log and the number of steps; first with the step alone, when the run
starts."""


@dataclass(frozen=True)
class FitOptions:
    """How a run is saved; it does not change the result.

    ``resume`` continues the run in the folder, ``accept_changes`` even if its settings or files
    have changed; ``overwrite`` replaces it. A checkpoint is saved before the first step, every
    ``save_every`` steps, once ``save_minutes`` have passed since the last, and at the end. The loss
    on the validation examples is computed every ``val_every`` steps and at the end. ``keep_best``
    keeps the result with the lowest of these losses in the subfolder `best.FOLDER`; ``patience``
    does, too, and ends the run after so many of them in a row that are no lower.

    Errors: ValueError for an interval that is not positive, or for ``resume`` with ``overwrite``.
    """

    resume: bool = False
    overwrite: bool = False
    accept_changes: bool = False
    save_every: int = 50
    save_minutes: float = math.inf
    val_every: int = 50
    keep_best: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "val_every", "save_minutes", "patience"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name):g}: expected more than 0")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite: expected one of the two")


@dataclass(frozen=True, eq=False)
class Outcome:
    """The last saved state of a run, and why it stopped before its last step, if it did.

    ``stop_reason``: "" (it did not), "interrupted", or how it diverged. ``early``: whether it ended
    because its patience did; ``best``: which result is the best in validation, if that is kept.
    """

    state: TrainState
    steps: int
    stop_reason: str = ""
    early: bool = False
    best: str = ""


def fit(
    out: Path | str,
    run: Run,
    options: FitOptions = FitOptions(),
    watch: Watch | None = None,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Train and keep the run in the folder ``out``: its result, its log, its checkpoints.

    Ctrl-C saves the last complete step. After a divergence, in validation or after the last step,
    too, the last checkpoint and its result stay. ``tell`` is called with messages for the user.
    Of a team of processes (``run.plan.team``) each calls this; the first alone reads and writes the
    folder, and whoever calls it ends the others if it ends early.

    Errors: those of `run_folder.open_folder` and `loop.train_steps`; OSError if the disk is full or
    not writable: what was saved before stays.
    """
    out = Path(out)
    best.check(run, options.keep_best or options.patience is not None)
    if run.plan.team.rank:
        return _follow(run, options)
    with lock_folder(out):
        state, messages = open_folder(
            out, run, options.resume, options.overwrite, options.accept_changes
        )
        for message in messages:
            tell(message)
        lines = read_log(out / LOG)
        run.plan.team.share((state, lines))
        fitting = _Fitting(out, run, options, state, lines, watch)
        try:
            fitting.train()
            write_for_readers(out, run)
        except KeyboardInterrupt:
            fitting.save()
            cut_log(out / LOG, fitting.state.step)  # the last line's step may not have been taken
            write_for_readers(out, run)
            return Outcome(fitting.state, run.total_steps, "interrupted")
        except OSError as error:
            saved = checkpoints.saved(out / checkpoints.FOLDER)
            kept = f"saved: {saved[-1].stem} of {run.total_steps}" if saved else "nothing is saved"
            text = f"{error.strerror or error}; {kept}: check the disk, then use --resume"
            raise OSError(error.errno, text, error.filename or str(out)) from error
        except Diverged as error:
            outcome = Outcome(fitting.restore(), run.total_steps, str(error))
            write_for_readers(out, run)
            return outcome
        early = fitting.best is not None and fitting.state.step < run.total_steps
        kept = fitting.best.text if fitting.best else ""
        return Outcome(fitting.state, run.total_steps, early=early, best=kept)


def _follow(run: Run, options: FitOptions) -> Outcome:
    """The part of a process that is not the first of its team: the same steps, without a folder."""
    state, lines = run.plan.team.share(None)
    following = _Following(Path(os.devnull), run, options, state, lines, None)
    try:
        following.train()
    except Diverged as error:
        return Outcome(following.state, run.total_steps, str(error))
    return Outcome(following.state, run.total_steps)


class _Fitting:
    """A run that is being trained: its state, and what of it is saved.

    ``lines``: those of the log so far.
    """

    def __init__(
        self,
        out: Path,
        run: Run,
        options: FitOptions,
        state: TrainState,
        lines: Sequence[Mapping[str, Any]],
        watch: Watch | None,
    ) -> None:
        self.out, self.run, self.options, self.state, self.watch = out, run, options, state, watch
        self.saved_step = -1
        self.saved_at = time.monotonic()
        tokens, pad, data = run.config.batch_tokens, run.pad, run.data
        self.best: best.Best | None = None
        if options.keep_best or options.patience is not None:
            self.best = best.Best(out, run, options.patience, lines)
        self.validation = batches_of(data.valid, tokens, pad)
        self.last_check = batches_of(data.train[:CHECKED], tokens, pad)[:1]

    def train(self) -> None:
        """Train from the state to the last step."""
        run = self.run
        self.begin()
        self._show({"step": self.state.step})
        with blas_threads(1), self.open_log() as log:
            started = time.perf_counter()
            for after, record in train_steps(run, self.state):
                seconds = time.perf_counter() - started
                line: dict[str, Any] = vars(record) | {
                    "tokens_per_second": round(record.tokens / seconds, 1),
                    "memory": peak_memory(),
                }
                line |= self._checked(after)
                log.write(log_line(line))
                log.flush()
                self.state = after
                if self._save_is_due():
                    self.save()
                self._show(line)
                if self.best is not None and self.best.is_over:
                    break
                started = time.perf_counter()
        self.save()

    def begin(self) -> None:
        """Write what stays as it is, and the first checkpoint."""
        if writes_own_base(self.run) and self.state.step == 0:
            write_base(self.out / BASE_FOLDER, self.run)
        self.save()

    def open_log(self) -> TextIO:
        """The log, to write at its end."""
        return (self.out / LOG).open("a", encoding="utf-8")

    def _checked(self, state: TrainState) -> dict[str, float]:
        """The validation loss, if it is due. Errors: Diverged."""
        step, last = state.step, state.step == self.run.total_steps
        losses = {}
        if self.validation and (step % self.options.val_every == 0 or last):
            losses["val_loss"] = val_loss = run_loss(self.run, state, self.validation)
            if not math.isfinite(val_loss):
                raise Diverged(step, f"the loss in validation is {val_loss:g}")
            if self.best is not None:
                self.best.see(state, val_loss, keep=not self.run.plan.team.rank)
        if last:
            assert state.first_loss is not None
            loss = run_loss(self.run, state, self.last_check)
            check_loss(step, loss, state.first_loss, self.run.c)
            self._check_learned(state, loss)
        return losses

    def _check_learned(self, state: TrainState, loss: float) -> None:
        """Errors: Diverged if all examples were seen, `LEARNS` steps made, and nothing was gained.

        ``loss``: that of `last_check`.
        """
        if state.epoch == 0 or state.step < LEARNS:
            return
        start = replace(state, params=self.run.initial)
        before = run_loss(self.run, start, self.last_check)
        if not loss < before:
            raise Diverged(
                state.step,
                f"nothing was learned: the loss on examples that were trained on is {loss:.4g}, "
                f"before training it was {before:.4g}",
            )

    def _save_is_due(self) -> bool:
        minutes = (time.monotonic() - self.saved_at) / 60
        return self.state.step % self.options.save_every == 0 or (
            minutes >= self.options.save_minutes
        )

    def _show(self, line: Mapping[str, Any]) -> None:
        if self.watch is not None:
            self.watch(line, self.run.total_steps)

    def save(self) -> None:
        """Write a checkpoint and the result, unless this step's are written."""
        if self.saved_step != self.state.step:
            checkpoints.save(self.out / checkpoints.FOLDER, self.state)
            write_result(self.out, self.run, self.state.params)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()

    def restore(self) -> TrainState:
        """The state that was saved last; the log ends there, too."""
        cut_log(self.out / LOG, self.saved_step)
        name = checkpoints.name_of(self.saved_step)
        return checkpoints.load(self.out / checkpoints.FOLDER / name)


class _Following(_Fitting):
    """The same run in a process that writes nothing."""

    def begin(self) -> None:
        """The first process writes."""

    def open_log(self) -> TextIO:
        """A log that nobody reads."""
        return io.StringIO()

    def save(self) -> None:
        """The first process saves."""


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def run_loss(run: Run, state: TrainState, batches: Any) -> float:
    """The mean loss of the model in this state on the batches."""
    return mean_loss(batches, run.weights(state.params), run.c, run.spec, run.plan).loss


def peak_memory() -> int | None:
    """The most bytes of memory that the process has used; None if the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
