"""``minilora train``: fine-tune a model on a file of examples."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from minilora.cli.config_file import with_config
from minilora.cli.console import FAILED, INTERRUPTED, OK, say
from minilora.cli.options import add_command, add_model, at_least, kinds_of
from minilora.cli.progress import sigterm_interrupts, steps_bar

if TYPE_CHECKING:
    from minilora.io.loading import Base
    from minilora.training.config import TrainConfig
    from minilora.training.example import Data
    from minilora.training.fit import FitOptions, Outcome
    from minilora.training.run import Run
    from minilora.training.team import Alone


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        "fine-tune a model on a file of examples",
        "Train an adapter on a model's frozen weights and write it to the folder OUT in PEFT's "
        "format, with a log, checkpoints and all settings. Without --model and --data: a shipped "
        "reference model, and a task that it has not learned. With --adapter: go on from that "
        "adapter, with its rank, scale, variant and modules.",
        _run,
    )
    option = parser.add_argument
    whole, real, flag = kinds_of(option)
    add_model(option, trained=False)
    add_data(option)
    config = "read options from a TOML file or a run.json; the command line takes precedence"
    option("--config", metavar="FILE", help=config)
    option("--output", metavar="OUT", help="folder for the run and its result")

    whole("--rank", default=8, metavar="R", help="rank of the adapters")
    real("--alpha", metavar="A", help="the adapters' scale is A / R (default: 2 R)")
    add_adapter(option)
    flag("--allow-high-rank", help="take a rank above a module's number of features")
    flag("--full", help="train all weights and no adapter")

    real("--learning-rate", help="learning rate (default: 0.001; with --full: 0.0001)")
    ratio = "learning rate of B over that of A (default: 1; with --variant lora+: 16)"
    real("--loraplus-lr-ratio", help=ratio)
    real("--weight-decay", default=0.0, help="weight decay of AdamW")
    real("--max-grad-norm", default=1.0, help="maximum gradient norm; 0 disables clipping")
    add_schedule(option)
    whole(
        "--seed", default=0, help="seed of the adapters' start, the order of the data and dropout"
    )

    whole("--threads", default=1, help="number of threads")
    recompute = (
        "recompute activations in the backward pass: less memory, more time, the same result"
    )
    flag("--gradient-checkpointing", help=recompute)
    add_prefix(option)
    add_val_fraction(option)
    flag("--train-on-prompt", help="compute the loss on prompt tokens, too")
    flag("--skip-invalid", help="skip invalid lines instead of stopping")
    flag("--show-batch", help="print the first batch token by token, and exit")
    flag("--dry-run", help="print what the run will take: data, steps, time, memory; and exit")

    whole("--save-every", default=50, help="save every N steps")
    minutes = "also save X minutes after the last save (default: never)"
    real("--save-minutes", default=math.inf, help=minutes)
    whole("--val-every", default=50, help="compute the validation loss every N steps")
    flag("--keep-best", help="also keep the result with the lowest validation loss, in OUT/best")
    patience = "end after N validations in a row without a lower loss; implies --keep-best"
    whole("--patience", help=patience)
    flag("--resume", help="continue the run in OUT, to the same bits")
    flag("--accept-changes", help="resume even if settings or files have changed")
    flag("--overwrite", help="replace the run in OUT")


def add_data(option: Any) -> None:
    """Add the options that say what to train on."""
    files = (
        "a .jsonl, .json, .csv, .parquet or .txt file, a folder with train, valid and test files, "
        "a folder of texts, or task:NAME"
    )
    option("--data", metavar="D", help=files)
    tasks = "lm, chat, summarize or classify (default: lm; for an encoder, classify)"
    option("--task", metavar="TASK", help=tasks)
    date = "the date that the chat template sees, YYYY-MM-DD (default: the run's own, or today)"
    option("--date", metavar="DATE", help=date)


def add_adapter(option: Any) -> None:
    """Add the options of adapters, besides rank and alpha."""
    _, real, _ = kinds_of(option)
    real("--dropout", default=0.0, metavar="P", help="dropout probability of the adapters' input")
    modules = "modules to adapt: q,v,... or a regular expression such as 'layers\\.0\\..*'"
    option("--target-modules", default="all-linear", metavar="NAMES", help=modules)
    layers = "layers to adapt: last:N, or indices such as 0,1,4-7 (default: all)"
    option("--layers", metavar="WHICH", help=layers)
    variants = "LoRA variant; minilora variants lists them"
    option("--variant", default="lora", metavar="NAME", help=variants)


def add_schedule(option: Any) -> None:
    """Add the options that say how long to train, and in which batches."""
    whole, _, _ = kinds_of(option)
    option("--lr-scheduler", default="cosine", metavar="KIND", help="constant, linear or cosine")
    whole("--warmup-steps", default=0, help="steps in which the learning rate rises")
    whole("--num-train-epochs", default=1, help="passes over the training data")
    whole("--max-steps", help="number of steps; overrides --num-train-epochs")
    tokens = "maximum tokens per micro-batch, padding included"
    whole("--batch-tokens", default=1024, help=tokens)
    whole("--gradient-accumulation-steps", default=1, help="micro-batches per step")
    whole("--max-length", default=512, help="maximum tokens per example")


def add_prefix(option: Any) -> None:
    """Add the options that say where the frozen prefix is kept."""
    where = (
        "where to keep the output of the frozen layers below the adapters, which is the same in "
        "every epoch: memory, none, or a folder (default: memory, if there is a second epoch)"
    )
    option("--prefix-cache", metavar="WHERE", help=where)
    dtype = "dtype of that cache: float32, or float16 or bfloat16, which round"
    option("--prefix-dtype", default="float32", metavar="T", help=dtype)


def add_val_fraction(option: Any) -> None:
    """Add the option that holds out a part of the training data."""
    _, real, _ = kinds_of(option)
    fraction = "fraction of the training file to hold out for validation"
    real("--val-fraction", default=0.0, help=fraction)


LEAST_OF_SCHEDULE = {
    "num_train_epochs": 1,
    "max_steps": 1,
    "batch_tokens": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "warmup_steps": 0,
}
LEAST = LEAST_OF_SCHEDULE | {
    **dict.fromkeys(("rank", "threads", "save_every", "val_every", "patience"), 1),
    "seed": 0,
}
"""The least value of each whole number."""

ADAPTER_OPTIONS = (
    *("rank", "alpha", "dropout", "target_modules", "layers", "variant", "loraplus_lr_ratio"),
    "allow_high_rank",
)  # fmt: skip
"""The options that mean nothing with ``--full``."""

OF_TRAINING = ("dropout", "loraplus_lr_ratio")
"""Those of them that do with ``--adapter``: they are no property of the adapter."""


def _check_adapter_options(arguments: argparse.Namespace) -> None:
    """Errors: ValueError for an option of fresh adapters with ``--full`` or ``--adapter``."""
    from minilora.training.config import TrainConfig

    if arguments.full and arguments.adapter:
        raise ValueError("--full with --adapter: expected one of the two")
    if not arguments.full and not arguments.adapter:
        return
    defaults = {f.name: f.default for f in fields(TrainConfig)} | {"alpha": None, "layers": None}
    other = "--full" if arguments.full else "--adapter"
    names = [name for name in ADAPTER_OPTIONS if arguments.full or name not in OF_TRAINING]
    for name in names:
        if (value := getattr(arguments, name)) != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} with {other}: expected one of the two")


def config_of(arguments: argparse.Namespace, task: str, layers: int | None = None) -> TrainConfig:
    """The configuration that the options give; ``layers``: how many the model has, if known.

    Errors: ValueError for an option of adapters with ``--full``.
    """
    from minilora.training.config import TrainConfig

    _check_adapter_options(arguments)
    values = {
        f.name: getattr(arguments, f.name) for f in fields(TrainConfig) if f.name in arguments
    }
    if arguments.learning_rate is None:
        # Full fine-tuning is best at about a tenth of LoRA's learning rate, whatever the model
        # (Schulman et al. 2025, "LoRA Without Regret").
        values["learning_rate"] = 1e-4 if arguments.full else 1e-3
    if arguments.alpha is None:
        values["alpha"] = 2 * arguments.rank
    values["target_modules"] = target_modules(arguments.target_modules)
    if arguments.layers is not None:
        values["layers_to_transform"] = chosen_layers(arguments.layers, layers)
    return TrainConfig(**values | {"task": task})


def target_modules(text: str) -> str | list[str]:
    """A list of names; or the text itself, if it is a regular expression."""
    if text == "all-linear" or set(text) & set("*+?|()[]^$\\"):
        return text
    return [name.strip() for name in text.split(",")]


def chosen_layers(text: str, layers: int | None) -> list[int]:
    """The indices that ``last:N`` or ``0,1,4-7`` name, of so many layers, if that is known.

    Errors: ValueError for another form, or for an index that the model has not.
    """
    last = re.fullmatch(r"last:([1-9]\d{0,5})", text)
    parts = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip()) for part in text.split(",")]
    if last:
        n = int(last[1])
        high = n if layers is None else layers
        indices = list(range(high - n, high))
    elif all(parts):
        ends = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
        indices = sorted({i for low, high in ends for i in range(low, high + 1)})
    else:
        raise ValueError(f"--layers {text!r}: expected last:N, or indices such as 0,1,4-7")
    if not indices or (layers is not None and not 0 <= indices[0] <= indices[-1] < layers):
        raise ValueError(
            f"--layers {text}: expected indices of the model's layers, 0 to {(layers or 1) - 1}"
        )
    return indices


def data_and_task(base: Base, data: str | None, task: str | None) -> tuple[str, str]:
    """The data and the task; by default the task that a reference model has not learned."""
    from minilora.io import reference_models

    if data is None:
        if base.reference is None:
            raise ValueError("--data is missing: expected a file, a folder or task:NAME")
        data = "task:" + reference_models.tasks(base.reference)[1]
    return data, task or ("lm" if base.config.causal else "classify")


LARGE_SCALE, LARGE_RATE = 64, 1
"""A scale or a learning rate above these is so large that halving it does not help."""


def _advice(config: TrainConfig) -> str:
    """What to do after a divergence."""
    scale = config.alpha / config.rank
    if not config.full and scale > LARGE_SCALE:
        return (
            f"the scale, alpha / rank, is {scale:g}: start again with a smaller --alpha, such as "
            f"{2 * config.rank}"
        )
    lr = config.learning_rate / 4
    if config.learning_rate > LARGE_RATE:
        lr = 1e-4 if config.full else 1e-3
    return (
        f"continue with a smaller learning rate: --resume --accept-changes --learning-rate {lr:g}, "
        "or start again with --warmup-steps, a smaller --learning-rate or --max-grad-norm"
    )


def _run(arguments: argparse.Namespace) -> int:
    from minilora.cli.team import Told, ending_together, together
    from minilora.training.run_folder import check_same
    from minilora.training.team import from_environment

    team = from_environment()
    try:
        with ending_together(team):
            run = together(team, lambda: _prepared(arguments, team))
            if run is None:
                return OK
            together(team, lambda: check_same(run))
            return _train(with_config(arguments), run)
    except Told as told:
        if team.rank:
            return FAILED
        raise told.cause from None


def _prepared(arguments: argparse.Namespace, team: Alone) -> Run | None:
    """The run of the options; None where it was only to be shown."""
    from pathlib import Path

    import numpy as np

    from minilora.io.loading import open_adapted, open_base, open_base_of
    from minilora.training.dry_run import dry_run
    from minilora.training.gradients import ExecutionPlan
    from minilora.training.memory import keep_freed_memory
    from minilora.training.prefix_store import with_kept_prefix
    from minilora.training.run import prepare
    from minilora.training.run_folder import is_free

    arguments = with_config(arguments)
    at_least(arguments, **LEAST)
    only_shown = arguments.show_batch or arguments.dry_run
    if arguments.output is None and not only_shown:
        raise ValueError("--output is missing: expected the folder for the run and its result")
    options = _fit_options(arguments)
    # What is wrong with the options or the folder is told before a model is read.
    config_of(arguments, arguments.task or "lm")
    if arguments.output is not None and not only_shown and not team.rank:
        is_free(Path(arguments.output), options.resume or options.overwrite)
    name, dtype = arguments.model or "reference:llama", np.dtype(arguments.dtype)
    if arguments.adapter is None:
        base = open_base(name, dtype, keep_quantized=arguments.gradient_checkpointing)
        adapter = None
    else:
        base = open_base_of(arguments.model, arguments.adapter, dtype)
        adapter = open_adapted(base, arguments.adapter, dtype)
    path, task = data_and_task(base, arguments.data, arguments.task)
    config = config_of(arguments, task, base.config.layers)
    plan = ExecutionPlan(
        threads=arguments.threads,
        gradient_checkpointing=arguments.gradient_checkpointing,
        team=team,
    )
    data = _read(arguments, base, path, config)
    if arguments.show_batch:
        _show_batch(base, data, config)
        return None
    reading = ("train_on_prompt", "val_fraction", "skip_invalid")
    settings = {name: getattr(arguments, name) for name in reading}
    # Another number of threads may sum in another order, and give other bits.
    settings |= {"threads": plan.threads, "from_adapter": arguments.adapter}
    run = prepare(base, data, config, path, plan, adapter, **settings)
    run = with_kept_prefix(run, arguments.prefix_cache, arguments.prefix_dtype)
    _say_sizes(run)
    if not arguments.gradient_checkpointing:
        keep_freed_memory()
    if arguments.dry_run:
        say(dry_run(run))
        return None
    return run


def _fit_options(arguments: argparse.Namespace) -> FitOptions:
    from minilora.training.fit import FitOptions

    return FitOptions(**{f.name: getattr(arguments, f.name) for f in fields(FitOptions)})


def _say_sizes(run: Run) -> None:
    """Print how many parameters are trained, on how many examples, in how many processes."""
    base, data, team = run.base, run.data, run.plan.team
    trained, total = (
        sum(math.prod(w.shape) for w in weights.values()) for weights in (run.initial, base.weights)
    )
    cut = ""
    if data.truncated:
        cut = f", {data.truncated} of them cut to {run.config.max_length} tokens"
    say(
        f"{base.name}: {total} parameters, {trained} trained"
        f"{f', in {team.size} processes' if team.size > 1 else ''}\n"
        f"{run.source}: {counted(data.train)}{cut}, {len(data.valid)} for validation\n"
    )


def _train(arguments: argparse.Namespace, run: Run) -> int:
    """Train, and print the result; the exit status."""
    outcome, last_line = _fit(arguments.output, run, _fit_options(arguments))
    team, config = run.plan.team, run.config
    if outcome.stop_reason:
        status = _report_stop(outcome, config, arguments.output)
        if outcome.stop_reason == "interrupted":
            team.end(status)  # the others wait for the next step
        return status
    if team.rank:
        return OK
    return _report_result(outcome, config, arguments.output, last_line)


def counted(examples: Sequence[Any]) -> str:
    """How many examples there are, in words."""
    return f"{len(examples)} example{'s' * (len(examples) != 1)}"


def _read(arguments: argparse.Namespace, base: Base, path: str, config: TrainConfig) -> Data:
    """The examples; the first lines that were skipped are printed."""
    from minilora.io.loading import run_of
    from minilora.training.data import read

    before = run_of(arguments.output) if arguments.resume else {}
    data = read(
        path, config.task, base.tokenizer, config.max_length, skip_invalid=arguments.skip_invalid,
        train_on_prompt=arguments.train_on_prompt, val_fraction=arguments.val_fraction,
        seed=config.seed, classes=base.classes, numeric_labels=True,
        date=arguments.date or before.get("data", {}).get("date"),
    )  # fmt: skip
    for line in data.skipped[:5]:
        say(f"{line.path}, line {line.line}: skipped: {line.reason}\n")
    if data.skipped[5:]:
        say(f"and {len(data.skipped) - 5} more lines\n")
    return data


def _show_batch(base: Base, data: Data, config: TrainConfig) -> None:
    from minilora.training.batching import batch, shown
    from minilora.training.run import micro_batches

    rows = micro_batches(data.train, config, 0)[0]
    say(shown(batch([data.train[i] for i in rows], base.tokenizer.pad), base.tokenizer))


def _fit(out: str, run: Run, options: FitOptions) -> tuple[Outcome, dict[str, Any]]:
    """Train behind a progress bar; how it ended, and all that the log says last."""
    from minilora.training.fit import fit

    last_line: dict[str, Any] = {}
    signals = nullcontext() if run.plan.team.rank else sigterm_interrupts()
    with signals, steps_bar() as bar:

        def watch(line: Any, steps: int) -> None:
            last_line.update(line)
            if bar is not None:
                bar(line, steps)

        return fit(out, run, options, watch, lambda text: say(text + "\n")), last_line


def _report_stop(outcome: Outcome, config: TrainConfig, out: str) -> int:
    """Print why the run stopped; the exit status."""
    saved = f"saved in {out}: step {outcome.state.step} of {outcome.steps}"
    if outcome.stop_reason == "interrupted":
        print(f"interrupted; {saved}; continue with --resume", file=sys.stderr)
        return INTERRUPTED
    reason = outcome.stop_reason
    print(f"minilora train: diverged at {reason}; {saved}; {_advice(config)}", file=sys.stderr)
    return FAILED


def _report_result(
    outcome: Outcome, config: TrainConfig, out: str, last_line: dict[str, Any]
) -> int:
    """Print the result and draw its losses; the exit status."""
    from minilora.training.plot import plot
    from minilora.training.run_folder import PLOT

    step, steps = outcome.state.step, outcome.steps
    if "loss" in last_line:
        losses = f"loss {last_line['loss']:.4f}"
        if "val_loss" in last_line:
            losses += f", {last_line['val_loss']:.4f} in validation"
        say(f"step {step} of {steps}: {losses}\n")
    else:
        say(f"{out} is at step {step} of {steps}: nothing to do\n")
    if outcome.early:
        say("stopped early: the validation loss has not fallen any more\n")
    say(f"{out}: {'a model' if config.full else 'an adapter'}\n")
    if outcome.best:
        say(f"{outcome.best}\n")
    try:
        plot(out)
    except ImportError as error:
        say(f"{error}\n")
    except KeyboardInterrupt:
        text = f"interrupted before {PLOT} was drawn; the run is saved in {out}, step {step}"
        print(text, file=sys.stderr)
        return INTERRUPTED
    return OK
