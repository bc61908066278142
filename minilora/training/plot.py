"""The loss of a run as a picture."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilora.io.atomic import write_files
from minilora.training.run_folder import LOG, PLOT, read_log


def canvas(size: tuple[float, float]) -> tuple[Any, Callable[[], bytes]]:
    """A matplotlib figure, and a function that draws it as SVG: same figure, same bytes.

    Errors: ImportError that names the extra.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        extra = "python -m pip install 'minilora[plot]'"
        raise ImportError(f"the plot needs the library matplotlib: {extra}") from error
    figure = Figure(figsize=size, layout="constrained")

    def draw() -> bytes:
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "minilora"}):
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        return buffer.getvalue()

    return figure, draw


def plot(out: Path | str) -> Path:
    """Draw the training and validation loss of the log as ``loss.svg``, with matplotlib.

    Errors: ImportError without matplotlib; ValueError for a log without steps.
    """
    out = Path(out)
    lines = read_log(out / LOG)
    if not lines:
        raise ValueError(f"{out / LOG}: no steps to plot")
    figure, draw = canvas((7, 4))
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label="training")
    validated = [line for line in lines if "val_loss" in line]
    if validated:
        steps, losses = zip(*((line["step"], line["val_loss"]) for line in validated), strict=True)
        axes.plot(steps, losses, "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss in nats per label")
    axes.legend()
    write_files(out, {PLOT: draw})
    return out / PLOT
