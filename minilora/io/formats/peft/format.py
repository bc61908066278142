"""The `Format` of PEFT's adapter folders."""

from pathlib import Path
from typing import Any

from minilora.io.formats.factors import config_from_factors
from minilora.io.formats.format import AdapterWeights, Base, Format
from minilora.io.formats.peft import read, write
from minilora.io.formats.peft.config import read_lora_config
from minilora.io.formats.peft.names import WEIGHTS
from minilora.spec.lora import Params
from minilora.spec.models import Config


def _read(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read.read_adapter(path, c, dtype, base), read_lora_config(path, c))


def _write(path: Path, c: Config, adapter: AdapterWeights, base: Base) -> list[str]:
    W, tuning, config = adapter
    config = config or config_from_factors(path, c, W, tuning)
    write.write_adapter(
        path, c, W, tuning, config, base=base.weights, name_or_path=base.name_or_path
    )
    return []


FORMAT = Format(
    name="peft",
    library="PEFT",
    adapter_file=WEIGHTS,
    read_adapter=_read,
    write_adapter=_write,
    holds_config=True,
    scaling="scale alpha / r, or alpha / √r with use_rslora: {scales}",
)
