"""``minilora train``: fine-tune a model on a file of examples."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from minilora.cli.console import FAILED, INTERRUPTED, OK, say
from minilora.cli.options import add_command, add_model, at_least
from minilora.cli.progress import sigterm_interrupts, steps_bar

if TYPE_CHECKING:
    from minilora.io.loading import Base
    from minilora.training.config import TrainConfig
    from minilora.training.example import Data
    from minilora.training.fit import FitOptions, Outcome
    from minilora.training.run import Run


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        "fine-tune a model on a file of examples",
        "Train an adapter on a model's frozen weights and write it to the folder OUT in PEFT's "
        "format, with a log, checkpoints and all settings. Without --model and --data: a shipped "
        "reference model, and a task that it has not learned.",
        _run,
    )
    option = parser.add_argument
    add_model(option, adapter=False, trained=False)
    add_data(option)
    option("--output", required=True, metavar="OUT", help="folder for the run and its result")

    option("--rank", type=int, default=8, metavar="R", help="rank of the adapters")
    option("--alpha", type=float, metavar="A", help="the adapters' scale is A / R (default: 2 R)")
    add_adapter(option)
    option("--full", action="store_true", help="train all weights and no adapter")

    option(
        "--learning-rate",
        type=float,
        metavar="X",
        help="learning rate (default: 0.001; with --full: 0.0001)",
    )
    option(
        "--loraplus-lr-ratio",
        type=float,
        metavar="X",
        help="learning rate of B over that of A (default: 1; with --variant lora+: 16)",
    )
    option("--weight-decay", type=float, default=0.0, metavar="X", help="weight decay of AdamW")
    option(
        "--max-grad-norm",
        type=float,
        default=1.0,
        metavar="X",
        help="maximum gradient norm; 0 disables clipping",
    )
    add_schedule(option)
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the adapters' start, the order of the data and dropout",
    )

    option("--threads", type=int, default=1, metavar="N", help="number of threads")
    option(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, more time, the same result",
    )
    add_val_fraction(option)
    option("--train-on-prompt", action="store_true", help="compute the loss on prompt tokens, too")
    option("--skip-invalid", action="store_true", help="skip invalid lines instead of stopping")
    option(
        "--show-batch", action="store_true", help="print the first batch token by token, and exit"
    )

    option("--save-every", type=int, default=50, metavar="N", help="save every N steps")
    option(
        "--save-minutes",
        type=float,
        default=math.inf,
        metavar="X",
        help="also save X minutes after the last save (default: never)",
    )
    option(
        "--val-every",
        type=int,
        default=50,
        metavar="N",
        help="compute the validation loss every N steps",
    )
    option("--resume", action="store_true", help="continue the run in OUT, to the same bits")
    option(
        "--accept-changes",
        action="store_true",
        help="resume even if settings or files have changed",
    )
    option("--overwrite", action="store_true", help="replace the run in OUT")


def add_data(option: Any) -> None:
    """Add the options that say what to train on."""
    option(
        "--data",
        metavar="D",
        help="a .jsonl or .txt file, a folder with train, valid and test files, or task:NAME",
    )
    option(
        "--task",
        metavar="TASK",
        help="lm, chat, summarize or classify (default: lm; for an encoder, classify)",
    )


def add_adapter(option: Any) -> None:
    """Add the options of adapters, besides rank and alpha."""
    option(
        "--dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="dropout probability of the adapters' input",
    )
    option(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="modules to adapt: q,v,... or a regular expression such as 'layers\\.0\\..*'",
    )
    option(
        "--variant",
        default="lora",
        metavar="NAME",
        help="LoRA variant; minilora variants lists them",
    )


def add_schedule(option: Any) -> None:
    """Add the options that say how long to train, and in which batches."""
    option("--lr-scheduler", default="cosine", metavar="KIND", help="constant, linear or cosine")
    option(
        "--warmup-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps in which the learning rate rises",
    )
    option(
        "--num-train-epochs", type=int, default=1, metavar="N", help="passes over the training data"
    )
    option(
        "--max-steps", type=int, metavar="N", help="number of steps; overrides --num-train-epochs"
    )
    option(
        "--batch-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="maximum tokens per micro-batch, padding included",
    )
    option(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches per step",
    )
    option("--max-length", type=int, default=512, metavar="N", help="maximum tokens per example")


def add_val_fraction(option: Any) -> None:
    """Add the option that holds out a part of the training data."""
    option(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="X",
        help="fraction of the training file to hold out for validation",
    )


LEAST_OF_SCHEDULE = {
    "num_train_epochs": 1,
    "max_steps": 1,
    "batch_tokens": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "warmup_steps": 0,
}
LEAST = LEAST_OF_SCHEDULE | {"rank": 1, "threads": 1, "save_every": 1, "val_every": 1, "seed": 0}
"""The least value of each whole number."""

ADAPTER_OPTIONS = (
    *("rank", "alpha", "dropout", "target_modules", "variant", "loraplus_lr_ratio"),
)  # fmt: skip
"""The options that mean nothing with ``--full``."""


def config_of(arguments: argparse.Namespace, task: str) -> TrainConfig:
    """The configuration that the options give.

    Errors: ValueError for an option of adapters with ``--full``.
    """
    from minilora.training.config import TrainConfig

    defaults = {f.name: f.default for f in fields(TrainConfig)} | {"alpha": None}
    for name in ADAPTER_OPTIONS if arguments.full else ():
        if (value := getattr(arguments, name)) != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} with --full: expected one of the two")
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
    return TrainConfig(**values | {"task": task})


def target_modules(text: str) -> str | list[str]:
    """A list of names; or the text itself, if it is a regular expression."""
    if text == "all-linear" or set(text) & set("*+?|()[]^$\\"):
        return text
    return [name.strip() for name in text.split(",")]


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
    import numpy as np

    from minilora.io.loading import open_base
    from minilora.training.fit import FitOptions
    from minilora.training.gradients import ExecutionPlan
    from minilora.training.memory import keep_freed_memory
    from minilora.training.run import prepare

    at_least(arguments, **LEAST)
    options = FitOptions(**{f.name: getattr(arguments, f.name) for f in fields(FitOptions)})
    name, dtype = arguments.model or "reference:llama", np.dtype(arguments.dtype)
    base = open_base(name, dtype, keep_quantized=arguments.gradient_checkpointing)
    path, task = data_and_task(base, arguments.data, arguments.task)
    config = config_of(arguments, task)
    plan = ExecutionPlan(
        threads=arguments.threads, gradient_checkpointing=arguments.gradient_checkpointing
    )
    data = _read(arguments, base, path, config)
    if arguments.show_batch:
        _show_batch(base, data, config)
        return OK
    reading = ("train_on_prompt", "val_fraction", "skip_invalid")
    settings = {name: getattr(arguments, name) for name in reading}
    # Another number of threads may sum in another order, and give other bits.
    run = prepare(base, data, config, path, plan, threads=plan.threads, **settings)
    trained, total = (
        sum(math.prod(w.shape) for w in weights.values()) for weights in (run.initial, base.weights)
    )
    cut = f", {data.truncated} of them cut to {config.max_length} tokens" if data.truncated else ""
    say(
        f"{base.name}: {total} parameters, {trained} trained\n"
        f"{path}: {len(data.train)} examples{cut}, {len(data.valid)} for validation\n"
    )
    if not arguments.gradient_checkpointing:
        keep_freed_memory()
    outcome, last_line = _fit(arguments.output, run, options)
    if outcome.stop_reason:
        return _report_stop(outcome, config, arguments.output)
    _report_result(outcome, config, arguments.output, last_line)
    return OK


def _read(arguments: argparse.Namespace, base: Base, path: str, config: TrainConfig) -> Data:
    """The examples; the first lines that were skipped are printed."""
    from minilora.training.data import read

    data = read(
        path, config.task, base.tokenizer, config.max_length, skip_invalid=arguments.skip_invalid,
        train_on_prompt=arguments.train_on_prompt, val_fraction=arguments.val_fraction,
        seed=config.seed, classes=base.classes, numeric_labels=True,
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
    with sigterm_interrupts(), steps_bar() as bar:

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
) -> None:
    from minilora.training.plot import plot

    step, steps = outcome.state.step, outcome.steps
    if "loss" in last_line:
        losses = f"loss {last_line['loss']:.4f}"
        if "val_loss" in last_line:
            losses += f", {last_line['val_loss']:.4f} in validation"
        say(f"step {step} of {steps}: {losses}\n")
    else:
        say(f"{out} is at step {step} of {steps}: nothing to do\n")
    say(f"{out}: {'a model' if config.full else 'an adapter'}\n")
    try:
        plot(out)
    except ImportError as error:
        say(f"{error}\n")
