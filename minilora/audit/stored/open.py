"""An adapter's files opened, whatever their format."""

from __future__ import annotations

from pathlib import Path

from minilora.audit.stored.gguf import open_gguf
from minilora.audit.stored.kohya import open_kohya
from minilora.audit.stored.loralib import open_loralib
from minilora.audit.stored.mlx import open_mlx
from minilora.audit.stored.module import OpenAdapter
from minilora.audit.stored.peft import open_peft
from minilora.io.errors import FormatError, listed
from minilora.io.formats.mlx import WEIGHTS as MLX_WEIGHTS
from minilora.io.formats.peft.names import WEIGHTS as PEFT_WEIGHTS
from minilora.io.header import places
from minilora.io.loading import adapter_path

EXPECTED = (
    "a folder of PEFT's (adapter_model.safetensors) or of mlx-lm's (adapters.safetensors), a "
    ".gguf file, or a .safetensors file of kohya's or loralib's"
)


def open_adapter(name: str | Path) -> OpenAdapter:
    """What the files of an adapter hold; nothing but headers is read.

    Errors: FormatError for what is no adapter, and for damaged files; pickles are never opened.
    """
    form, path = recognised(name)
    return _OPEN[form](path)


_OPEN = {
    "peft": open_peft, "mlx": open_mlx, "gguf": open_gguf, "kohya": open_kohya,
    "loralib": open_loralib,
}  # fmt: skip


def recognised(name: str | Path) -> tuple[str, Path]:
    """An adapter's format, and its folder or file.

    Errors: FormatError for what is no adapter, and for pickles.
    """
    path = adapter_path(str(name))
    if path.is_dir():
        return _in_folder(path), path
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        remedy = "a pickle can run code: load it where it was made, and save it as safetensors"
        raise FormatError(path, "file", "a pickle", EXPECTED, remedy)
    if not path.is_file():
        raise FormatError(path, "adapter", "nothing there", EXPECTED, "check the path")
    if path.suffix == ".gguf":
        return "gguf", path
    if path.name == PEFT_WEIGHTS:
        return "peft", path.parent
    if path.name == MLX_WEIGHTS:
        return "mlx", path.parent
    names = places(path)[0]
    if any(".lora_down." in each for each in names):
        return "kohya", path
    if any(each.endswith((".lora_A", ".lora_B")) for each in names):
        return "loralib", path
    found = listed(names) or "no tensors"
    raise FormatError(path, "tensors", found, EXPECTED, "is it an adapter?")


def _in_folder(path: Path) -> str:
    files = {file.name for file in path.iterdir()}
    has_peft = PEFT_WEIGHTS in files or "adapter_model.bin" in files
    if has_peft and MLX_WEIGHTS in files:
        found = f"{PEFT_WEIGHTS} and {MLX_WEIGHTS}"
        remedy = "their configurations have one name: keep one of the two"
        raise FormatError(path, "adapter", found, "one of them", remedy)
    if has_peft:
        return "peft"
    if MLX_WEIGHTS in files:
        return "mlx"
    raise FormatError(path, "adapter", listed(files) or "an empty folder", EXPECTED, "check it")
