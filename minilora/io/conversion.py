"""An adapter, as it was opened, in another format."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilora.io.formats import peft
from minilora.io.formats.format import AdapterWeights, Format
from minilora.io.loading import AdaptedModel, open_adapted
from minilora.spec.lora import is_base


def write_adapter(path: Path | str, to: Format, model: AdaptedModel) -> list[str]:
    """Write the adapter of ``model`` in the format ``to``; what there is to tell the user.

    It acts on the base as it is, whatever its start has taken out of that.

    Errors: those of the format's writer, for what it cannot say.
    """
    if to.write_adapter is None:
        raise ValueError(f"{to.name}: no adapter is written in this format")
    notes: list[str] = []
    if model.config is not None and not to.holds_config:
        model, notes = _on_base(model)
    adapter = AdapterWeights(model.changed, model.tuning, model.config)
    return [*notes, *to.write_adapter(Path(path), model.base.config, adapter, model.base)]


def _on_base(model: AdaptedModel) -> tuple[AdaptedModel, list[str]]:
    """The adapter as factors on the base's own weights, and notes to the user.

    A start that is taken out of the base is written as PEFT does, with its factors beside it, at
    the doubled rank; copies of the base's weights, which PEFT saves with an adapted table, are left
    out.
    """
    base, config, notes = model.base, model.config, []
    assert config is not None
    if config.init_lora_weights in peft.INIT_FROM_BASE:
        with tempfile.TemporaryDirectory() as folder:
            write_adapter(folder, peft.FORMAT, model)
            dtype = next(iter(model.changed.values())).dtype
            model = open_adapted(base, folder, dtype)
        notes = [
            f"what {config.init_lora_weights} took out of the base is put back, at twice the rank"
        ]
    changed = {
        name: array
        for name, array in model.changed.items()
        if not is_base(name)
        or name in model.tuning.trained
        or not np.array_equal(array, base.weights[name])
    }
    return replace(model, changed=changed), notes
