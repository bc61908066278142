"""``minilora train``: fine-tune a model on a file, and keep what was learned."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.cli.console import (
    DEVIATES,
    HOLDS,
    INTERRUPTED,
    add_command,
    add_model,
    at_least,
    say,
    sigterm_interrupts,
    steps_bar,
)

if TYPE_CHECKING:
    from minilora.io.loading import Base
    from minilora.training.train import TrainConfig


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "train",
        "fine-tune a model on a file of examples",
        "Trains an adapter on a model's frozen weights, and writes it to the folder OUT in PEFT's "
        "format, with a log, checkpoints and all settings. Without a model or data: a shipped "
        "reference model, and a task that it has not learned.",
        _run,
    )
    option = parser.add_argument
    add_model(option, adapter=False)
    option("--data", metavar="D", help="JSON lines, a folder of train/valid/test, text, task:NAME")
    option(
        "--task",
        metavar="TASK",
        help="lm, chat, summarize or classify (default: lm; of an encoder, classify)",
    )
    option("--output", required=True, metavar="OUT", help="the folder of the run and its result")

    option("--rank", type=int, default=8, metavar="R", help="of the adapters")
    option("--alpha", type=float, metavar="A", help="the scale is A / R (default: 2 R)")
    option("--dropout", type=float, default=0.0, metavar="P", help="of the adapters' input")
    option(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="q,v,... or an expression for whole names, such as 'layers\\.0\\..*'",
    )
    option("--variant", default="lora", metavar="NAME", help="as minilora variants lists them")
    option("--full", action="store_true", help="train every weight and no adapter: the baseline")

    option(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="learning rate (default: 0.001; --full: a tenth)",
    )
    option(
        "--loraplus-lr-ratio",
        type=float,
        metavar="X",
        help="B learns X times as fast (default: 1; 16 with --variant lora+)",
    )
    option("--lr-scheduler", default="cosine", metavar="KIND", help="constant, linear or cosine")
    option(
        "--warmup-steps", type=int, default=0, metavar="N", help="steps over which the rate rises"
    )
    option("--weight-decay", type=float, default=0.0, metavar="X", help="AdamW's")
    option(
        "--max-grad-norm", type=float, default=1.0, metavar="X", help="norm of gradients; 0: any"
    )
    option("--num-train-epochs", type=int, default=1, metavar="N", help="times through the data")
    option("--max-steps", type=int, metavar="N", help="so many steps, whatever the epochs")
    option("--batch-tokens", type=int, default=1024, metavar="N", help="in a micro-batch")
    option(
        "--gradient-accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="micro-batches in a step",
    )
    option("--max-length", type=int, default=512, metavar="N", help="most tokens of an example")
    option("--seed", type=int, default=0, metavar="N", help="of start, order and dropout")

    option("--threads", type=int, default=1, metavar="N", help="threads that share a step's work")
    option(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, more time, the same bits",
    )
    option(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of a file, to validate with",
    )
    option("--train-on-prompt", action="store_true", help="what is asked counts, too")
    option("--skip-invalid", action="store_true", help="leave out lines that cannot be used")
    option("--show-batch", action="store_true", help="print the first batch with its mask, and end")

    option("--save-every", type=int, default=50, metavar="N", help="save after every N steps")
    option(
        "--save-minutes",
        type=float,
        default=math.inf,
        metavar="X",
        help="save, too, X minutes after the last save (default: never)",
    )
    option("--val-every", type=int, default=50, metavar="N", help="validate after every N steps")
    option("--resume", action="store_true", help="go on with the run in OUT, to the same bits")
    option("--accept-changes", action="store_true", help="resume although settings have changed")
    option("--overwrite", action="store_true", help="replace the run in OUT")


LEAST = {
    **dict.fromkeys(
        (
            "rank",
            "num_train_epochs",
            "max_steps",
            "batch_tokens",
            "gradient_accumulation_steps",
            "threads",
        ),
        1,
    ),
    **dict.fromkeys(("save_every", "val_every"), 1),
    **dict.fromkeys(("warmup_steps", "seed"), 0),
    "max_length": 2,
}
"""What the numbers of these options are at least."""

OF_ADAPTERS = ("rank", "alpha", "dropout", "target_modules", "variant", "loraplus_lr_ratio")
"""What says nothing where every weight is trained."""


def recipe_of(arguments: argparse.Namespace, task: str) -> TrainConfig:
    """What decides the run's result, as the options have it.

    Errors: ValueError for an option of adapters where there are none.
    """
    from minilora.training.train import TrainConfig

    usual = {f.name: f.default for f in fields(TrainConfig)} | {"alpha": None}
    for name in OF_ADAPTERS if arguments.full else ():
        if (value := getattr(arguments, name)) != usual[name]:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value} with --full: it trains no adapter; leave one out")
    given = {f.name: getattr(arguments, f.name) for f in fields(TrainConfig) if f.name in arguments}
    # Full fine-tuning is best at about a tenth of LoRA's rate, whatever the model
    # (Schulman et al. 2025, "LoRA Without Regret").
    given["learning_rate"] = (
        (1e-4 if arguments.full else 1e-3)
        if arguments.learning_rate is None
        else arguments.learning_rate
    )
    given["alpha"] = 2 * arguments.rank if arguments.alpha is None else arguments.alpha
    given["target_modules"] = targets_of(arguments.target_modules)
    return TrainConfig(**given | {"task": task})


def targets_of(text: str) -> str | list[str]:
    """A list of names, or an expression, where the text has a sign that no name has."""
    if text == "all-linear" or set(text) & set("*+?|()[]^$\\"):
        return text
    return [name.strip() for name in text.split(",")]


def data_of(base: Base, data: str | None, task: str | None) -> tuple[str, str]:
    """The data and the task: of a reference model, the task that it has not learned."""
    from minilora.io import reference_models

    if data is None:
        if base.reference is None:
            raise ValueError("--data: none given; expected a file, a folder or task:NAME")
        data = "task:" + reference_models.tasks(base.reference)[1]
    return data, task or ("lm" if base.config.causal else "classify")


WIDE, FAST = 64, 1
"""A scale and a rate above these are no usual ones: a half of them helps no more than all."""


def _way_on(recipe: TrainConfig) -> str:
    """What to do after a divergence."""
    scale = recipe.alpha / recipe.rank
    if not recipe.full and scale > WIDE:
        return (
            f"the scale, alpha / rank, is {scale:g}: begin anew with a smaller --alpha, such as "
            f"{2 * recipe.rank}"
        )
    lr = recipe.learning_rate / 4 if recipe.learning_rate <= FAST else 1e-4 if recipe.full else 1e-3
    return (
        "go on from there with a smaller rate, --resume --accept-changes --learning-rate "
        f"{lr:g}, or begin anew with --warmup-steps, a smaller --learning-rate or --max-grad-norm"
    )


def _run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from minilora.io.loading import open_base
    from minilora.training import data
    from minilora.training.gradients import ExecutionPlan, warm_memory
    from minilora.training.train import fit, micro_batches, plot, prepare

    at_least(arguments, **LEAST)
    if not arguments.save_minutes > 0:
        raise ValueError(f"--save-minutes {arguments.save_minutes:g}: expected more than 0")
    name, dtype = arguments.model or "reference:llama", np.dtype(arguments.dtype)
    base = open_base(name, dtype, quantised=arguments.gradient_checkpointing)
    path, task = data_of(base, arguments.data, arguments.task)
    recipe = recipe_of(arguments, task)
    plan = ExecutionPlan(
        threads=arguments.threads, gradient_checkpointing=arguments.gradient_checkpointing
    )
    given: dict[str, Any] = {
        "train_on_prompt": arguments.train_on_prompt,
        "val_fraction": arguments.val_fraction,
    }
    read = data.read(
        path, task, base.tokenizer, recipe.max_length, skip_invalid=arguments.skip_invalid,
        seed=recipe.seed, classes=base.classes, by_place=True, **given,
    )  # fmt: skip
    for line in read.skipped[:5]:
        say(f"{line.path}, line {line.line}: left out: {line.why}\n")
    if read.skipped[5:]:
        say(f"and {len(read.skipped) - 5} lines more\n")
    if arguments.show_batch:
        rows = micro_batches(read.train, recipe, 0)[0]
        first = data.batch([read.train[i] for i in rows], base.tokenizer.pad)
        say(data.shown(first, base.tokenizer))
        return HOLDS
    given["skip_invalid"] = arguments.skip_invalid
    # A library of linear algebra may sum in another order on another number of threads.
    job = prepare(base, read, recipe, path, threads=plan.threads, **given)
    trained, whole = (
        sum(math.prod(array.shape) for array in held.values()) for held in (job.start, base.weights)
    )
    cut = f", {read.cut} of them cut to {recipe.max_length} tokens" if read.cut else ""
    say(
        f"{base.name}: {whole} parameters, {trained} trained\n"
        f"{path}: {len(read.train)} examples{cut}, {len(read.valid)} to validate with\n"
    )
    if not arguments.gradient_checkpointing:
        warm_memory()
    last: dict[str, Any] = {}
    with sigterm_interrupts(), steps_bar() as bar:

        def watch(line: Any, steps: int) -> None:
            last.update(line)
            if bar is not None:
                bar(line, steps)

        outcome = fit(
            Path(arguments.output),
            job,
            plan=plan,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            accept=arguments.accept_changes,
            save_every=arguments.save_every,
            save_seconds=60 * arguments.save_minutes,
            val_every=arguments.val_every,
            watch=watch,
            tell=lambda text: say(text + "\n"),
        )
    step, out = outcome.state.step, arguments.output
    if outcome.why:
        what = f"saved in {out}: step {step} of {outcome.steps}"
        if outcome.why == "interrupted":
            print(f"interrupted; {what}; go on with --resume", file=sys.stderr)
            return INTERRUPTED
        print(
            f"minilora train: diverged at {outcome.why}; {what}; {_way_on(recipe)}", file=sys.stderr
        )
        return DEVIATES
    if "loss" in last:
        valid = f", {last['val_loss']:.4f} in validation" if "val_loss" in last else ""
        say(f"step {step} of {outcome.steps}: loss {last['loss']:.4f}{valid}\n")
    else:
        say(
            f"{out} is at step {step}, and {outcome.steps} were asked for: nothing was left to do\n"
        )
    say(f"{out}: {'a model' if recipe.full else 'an adapter'}\n")
    try:
        plot(out)
    except ImportError as error:
        say(f"{error}\n")
    return HOLDS
