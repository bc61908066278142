"""PEFT's adapters in evaluation: the logits under a stored adapter, and what merging changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._peft import without_deprecation
from minilora.verify.peers._torch import to_numpy
from minilora.verify.peers._transformers import load_base, logits_of


class Inference:
    """Each call opens both folders anew."""

    def logits(
        self, model_dir: str | Path, adapter_dir: str | Path, input_ids: np.ndarray
    ) -> np.ndarray:
        """The logits of from_pretrained's model."""
        return logits_of(_opened(load_base(model_dir), adapter_dir), input_ids)

    def deltas(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, np.ndarray]:
        """The parameters after merge_and_unload less those before."""
        before = _parameters(load_base(model_dir))
        with torch.no_grad():
            try:
                merged = _opened(load_base(model_dir), adapter_dir).merge_and_unload()
            except RuntimeError as refused:  # a bias of B where the layer has none to add it to
                raise NotImplementedError(str(refused)) from refused
            after = _parameters(merged)
        return {name: array - before.get(name, 0) for name, array in after.items()}


def _opened(base: Any, adapter_dir: str | Path) -> Any:
    with without_deprecation():
        return peft.PeftModel.from_pretrained(base, str(adapter_dir), autocast_adapter_dtype=False)


def _parameters(model: Any) -> dict[str, np.ndarray]:
    """The parameters (out, in) by their modules' paths; a bias under ``.bias``."""
    found = {}
    for at, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            turned = isinstance(module, Conv1D) and part == "weight"
            array = to_numpy(parameter.T if turned else parameter)
            found[at if part == "weight" else f"{at}.{part}"] = array
    return found
