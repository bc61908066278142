"""What a run leaves for readers: a model card, and its log as a table."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora import __version__
from minilora.io.atomic import write_files
from minilora.training.result import writes_own_base
from minilora.training.run import Run
from minilora.training.run_folder import CARD, LOG, TABLE, WRITTEN, is_own_card, read_log

COLUMNS = (
    *("step", "epoch", "loss", "val_loss", "tokens", "labels", "learning_rate", "grad_norm"),
    *("tokens_per_second", "memory"),
)
"""The columns of the table, in their order."""

MOST_LOSSES = 12
"""So many rows of losses stand in a card at most."""


def write_for_readers(out: Path, run: Run) -> None:
    """Write the model card and the table of the log. A card that somebody has edited stays.

    Errors: OSError if the disk is full or not writable.
    """
    lines = read_log(out / LOG)
    files = {TABLE: table(lines).encode}
    if is_own_card(out) or not (out / CARD).exists():
        files[CARD] = card(run, lines, out.resolve().name).encode
    write_files(out, files)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The log as CSV: a row for each step, a column for each of `COLUMNS`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def card(run: Run, lines: Sequence[Mapping[str, Any]], name: str) -> str:
    """The model card, in Markdown with the front matter of Hugging Face's cards.

    The same run has the same card: nothing in it depends on the time or the machine.
    """
    parts = [
        _front_matter(run),
        WRITTEN,
        f"# {name}",
        _summary(run, lines),
        f"## Base model\n\n{_base(run)}",
        f"## Data\n\n{_data(run)}",
        f"## Losses\n\n{_losses(lines)}",
        f"## Settings\n\n{_settings(run)}",
        f"## Use\n\n{_use(run, name)}",
    ]
    return "\n\n".join(parts) + "\n"


def base_name(run: Run) -> str:
    """What the base is called: on the Hub if its files tell it, or else as it was named."""
    base = run.base
    named = base.name if base.reference else base.path.name
    return base.origin or (base.name if base.name.startswith("package:") else named)


def _front_matter(run: Run) -> str:
    base, causal = base_name(run), run.c.causal
    tags = [run.lora.variant if run.lora else "full", "minilora"]
    if run.lora:
        tags = [*dict.fromkeys(["lora", *tags])]
        tags[:0] = [f"base_model:adapter:{base}"] if "/" in base else []  # a name on the Hub
    lines = [
        f"base_model: {_quoted(base)}",
        f"library_name: {'peft' if run.lora else 'transformers'}",
        f"pipeline_tag: text-{'generation' if causal else 'classification'}",
        "tags:",
        *(f"- {_quoted(tag)}" for tag in tags),
    ]
    return "\n".join(["---", *lines, "---"])


def _quoted(text: str) -> str:
    """A text in YAML, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _summary(run: Run, lines: Sequence[Mapping[str, Any]]) -> str:
    base, steps = base_name(run), lines[-1]["step"] if lines else 0
    made = f"trained by minilora {__version__} in {steps} of {run.total_steps} steps"
    if run.lora is None:
        return f"A model: all weights of {base}, {made}."
    trained = sum(w.size for w in run.initial.values())
    lora = run.lora
    return (
        f"An adapter of {base} ({lora.variant}, rank {run.config.rank}, alpha "
        f"{run.config.alpha:g}; {trained} parameters), {made}."
    )


def _base(run: Run) -> str:
    base = run.base
    rows = [("name", base_name(run)), ("architecture", type(run.c).__name__)]
    if not base.reference:
        rows.append(("file" if base.path.is_file() else "folder", base.path.name))
    rows.append(("SHA-256", base.digest))
    text = _rows(rows)
    if base.path.is_file() and run.lora:
        text += (
            f"\n\nThe adapter was trained on the weights in {base.path.name}. If they are "
            "quantized, those of the original model differ from them."
        )
    if writes_own_base(run):
        text += "\n\nThe adapter acts on the weights in the folder `base`, and on no others."
    return text


def _data(run: Run) -> str:
    data = run.data
    rows: list[tuple[str, object]] = [
        ("name", Path(run.source).name if run.source else ""),
        ("task", run.config.task),
        ("examples", len(data.train)),
        ("for validation", len(data.valid)),
        ("cut to the greatest length", data.truncated),
        ("skipped lines", len(data.skipped)),
    ]
    rows += [("classes", ", ".join(data.classes))] if data.classes else []
    return _rows([*rows, ("SHA-256", data.digest)])


def _losses(lines: Sequence[Mapping[str, Any]]) -> str:
    """Some of the losses: all in validation, if these are few, and the first and the last."""
    if not lines:
        return "No step was made."
    validated = [line for line in lines if "val_loss" in line]
    few = validated if 0 < len(validated) < MOST_LOSSES - 1 else lines
    chosen = {lines[0]["step"]: lines[0], lines[-1]["step"]: lines[-1]}
    for k in range(MOST_LOSSES):
        line = few[k * (len(few) - 1) // (MOST_LOSSES - 1)]
        chosen[line["step"]] = line
    cells = [
        (step, f"{line['loss']:.4f}", f"{line['val_loss']:.4f}" if "val_loss" in line else "")
        for step, line in sorted(chosen.items())
    ]
    return "Nats per label.\n\n" + _rows(cells, ("step", "training", "validation"))


def _settings(run: Run) -> str:
    return _rows([(f"`{key}`", value) for key, value in sorted(run.settings.items())])


def _rows(rows: Sequence[tuple[Any, ...]], head: tuple[str, ...] = ("", "")) -> str:
    """A table in Markdown."""
    body = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in row) + " |" for row in body)


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _use(run: Run, name: str) -> str:
    base, causal = base_name(run), run.c.causal
    auto = f"AutoModelFor{'CausalLM' if causal else 'SequenceClassification'}"
    of_base = f"{name}/base" if writes_own_base(run) else base
    lines = [f"from transformers import {auto}", ""]
    if run.lora is None:
        lines += [f'model = {auto}.from_pretrained("{name}")']
    else:
        lines[0:0] = ["from peft import PeftModel"]
        labels = "" if causal else f", num_labels={len(run.data.classes)}"
        lines += [
            f'model = {auto}.from_pretrained("{of_base}"{labels})',
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
    option = "--adapter" if run.lora else "--model"
    command = "generate --chat" if causal and run.config.task == "chat" else "generate"
    shell = f"minilora {command if causal else 'evaluate'} {option} {name}"
    python = "\n".join(lines)
    return f"```python\n{python}\n```\n\n```sh\n{shell}\n```"
