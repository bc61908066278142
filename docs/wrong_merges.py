"""The ten commonest wrong merges, made on purpose from a reference model and its adapter.

Each is a function of the files' tensors: the base's weights W by name, the adapter's A and B by
module.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from minilora.io import reference_models
from minilora.io.atomic import write_tensors
from minilora.io.files import read_tensors

PREFIX = "base_model.model."
BFLOAT16 = ml_dtypes.bfloat16


@dataclass
class Files:
    """A base, an adapter and a merged model, as arrays; ``settings`` are the adapter's."""

    base: dict
    adapter: dict
    settings: dict
    merged: dict

    @property
    def modules(self):
        """The modules that the adapter changes."""
        ending = ".lora_A.weight"
        names = [name for name in self.adapter if name.endswith(ending)]
        return [name.removeprefix(PREFIX).removesuffix(ending) for name in names]

    def parts(self, module):
        """A and B."""
        return [self.adapter[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB"]

    def scale(self, rslora=False):
        r, alpha = self.settings["r"], self.settings["lora_alpha"]
        return np.float32(alpha / (r**0.5 if rslora else r))

    def merge(self, scale=None):
        """Merge each module: W + s B A, with another s than the adapter's if given."""
        s = self.scale(self.settings["use_rslora"]) if scale is None else np.float32(scale)
        self.merged = dict(self.base)
        for module in self.modules:
            A, B = self.parts(module)
            self.merged[f"{module}.weight"] = self.base[f"{module}.weight"] + s * (B @ A)


def reference():
    """The reference Llama with its adapter, merged as it should be."""
    folder = reference_models.folder() / "llama"
    files = Files(
        read_tensors(folder / "base/model.safetensors"),
        read_tensors(folder / "adapter/adapter_model.safetensors"),
        json.loads((folder / "adapter/adapter_config.json").read_text()),
        {},
    )
    files.merge()
    return files


def write(files, folder):
    """Write the three; their paths, by the names of the options of ``minilora audit merged``."""
    folder, source = Path(folder), reference_models.folder() / "llama"
    paths = {name: folder / name for name in ("base", "adapter", "merged")}
    for name, path in paths.items():
        shutil.copytree(source / ("adapter" if name == "adapter" else "base"), path)
    write_tensors(paths["base"] / "model.safetensors", files.base)
    write_tensors(paths["merged"] / "model.safetensors", files.merged)
    write_tensors(paths["adapter"] / "adapter_model.safetensors", files.adapter)
    (paths["adapter"] / "adapter_config.json").write_text(json.dumps(files.settings))
    return paths


def base_again(files):
    """The folder of the base is saved as the merged model."""
    files.merged = dict(files.base)


def rslora_ignored(files):
    """The adapter was trained with `use_rslora`, and is merged with alpha / r."""
    files.settings["use_rslora"] = True
    files.merge(files.scale(rslora=False))


def alpha_forgotten(files):
    """W + B A: the scale is left out."""
    files.merge(1)


def merged_twice(files):
    """A merged model is loaded with the adapter, and merged again."""
    files.merge(2 * files.scale())


def layer_left_out(files):
    """The names of one layer's tensors fit nothing, and nobody says so."""
    files.merge()
    lost = {name: W for name, W in files.base.items() if ".layers.1." in name}
    files.merged |= lost


def head_lost(files):
    """The head was trained in full (`modules_to_save`), and the merged model keeps the base's."""
    files.merge()
    files.settings["modules_to_save"] = ["lm_head"]
    head = files.base["lm_head.weight"]
    drawn = np.random.default_rng(0).standard_normal(head.shape).astype(np.float32)
    files.adapter[f"{PREFIX}lm_head.weight"] = head + np.float32(0.1) * drawn


def other_checkpoint(files):
    """The adapter of an earlier step of the same training is merged."""
    final = dict(files.adapter)
    files.adapter = {name: 0.7 * part if "lora_B" in name else 0.9 * part + 0.1 * part.mean()
                     for name, part in final.items()}  # fmt: skip
    files.merge()
    files.adapter = final


def dora_as_lora(files):
    """An adapter with `use_dora`, merged without its magnitudes."""
    files.merge()
    files.settings["use_dora"] = True
    for i, module in enumerate(files.modules):
        norm = np.linalg.norm(files.merged[f"{module}.weight"], axis=1)
        drawn = 1 + 0.1 * np.random.default_rng(i).standard_normal(len(norm))
        magnitude = (norm * drawn).astype(np.float32)
        files.adapter[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude


def other_base(files):
    """Merged into another revision of the base: it was trained on since, or its head replaced."""
    files.merge()
    name = "model.embed_tokens.weight"
    drawn = np.random.default_rng(0).standard_normal(files.base[name].shape)
    files.merged[name] = files.base[name] + np.float32(0.01) * drawn.astype(np.float32)


def rounded_away(files):
    """A small change is added to bfloat16 weights, whose units are larger."""
    files.base = {name: W.astype(BFLOAT16) for name, W in files.base.items()}
    files.adapter = {name: part * np.float32(2**-5) for name, part in files.adapter.items()}
    exact = Files({name: W.astype(np.float32) for name, W in files.base.items()},
                  files.adapter, files.settings, {})  # fmt: skip
    exact.merge()
    files.merged = {name: W.astype(BFLOAT16) for name, W in exact.merged.items()}


WRONG = (
    base_again,
    rslora_ignored,
    alpha_forgotten,
    merged_twice,
    layer_left_out,
    head_lost,
    other_checkpoint,
    dora_as_lora,
    other_base,
    rounded_away,
)
