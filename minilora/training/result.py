"""The result of a run as files: an adapter in PEFT's format, or a Hugging Face model."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from minilora.io.formats import huggingface, peft
from minilora.io.formats.huggingface import copy_tokenizer
from minilora.spec import adalora
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.target_modules import LoraConfig
from minilora.training.run import Run


def write_result(folder: Path | str, run: Run, params: Weights) -> None:
    """Write the trained parameters: an adapter in PEFT's format, or, if ``full``, a model.

    DoRA with its norm differentiated computes the same as DoRA, and is written as DoRA.

    Errors: those of the format's writer; OSError if the disk is full or not writable.
    """
    base, lora = run.base, run.lora
    if lora is None:
        labels = run.data.classes or None
        huggingface.write_model(
            folder, base.config, params, labels=labels, kept=base.generation_settings
        )
        copy_tokenizer(base, folder)
        return
    W, spec, base_weights = {**run.adapter, **params}, run.spec, base.weights
    if lora.entry.pruned:
        W, spec, lora = _without_pruned(W, spec, lora)
    if lora.entry.written_as:
        lora = replace(lora, variant=lora.entry.written_as)
        spec = replace(spec, variant=dict.fromkeys(spec.variant, lora.equation))
    if INITIALIZATIONS[lora.init_lora_weights].base != "kept":
        W = {name: run.weights(params)[name] for name in (*base.config.shapes(), *run.adapter)}
        base_weights = run.frozen if writes_own_base(run) else base_weights
    of = None if writes_own_base(run) else base.name_or_path
    peft.write_adapter(folder, base.config, W, spec, lora, base=base_weights, name_or_path=of)


def _without_pruned(
    W: Weights, spec: TrainableSpec, lora: LoraConfig
) -> tuple[Weights, TrainableSpec, LoraConfig]:
    """AdaLoRA's adapter without the triplets and modules that were pruned."""
    kept = adalora.without_pruned(W)
    ranks = {name.removesuffix(".E"): len(E) for name, E in kept.items() if name.endswith(".E")}
    spec = replace(spec, trained=spec.trained - (W.keys() - kept.keys()))
    patterns = {re.escape(at): r for at, r in ranks.items()}
    return kept, spec, replace(lora, target_modules=[*ranks], rank_pattern=patterns)


def writes_own_base(run: Run) -> bool:
    """Whether the adapter acts on another base than the model, which is then written beside it.

    LoftQ's adapter acts on the quantized base; the difference has no low rank.
    """
    return run.lora is not None and INITIALIZATIONS[run.lora.init_lora_weights].base == "quantized"


def write_base(folder: Path | str, run: Run) -> None:
    """Write the base on which the adapter acts, with its tokenizer, as a Hugging Face model.

    Errors: those of the format's writer; OSError if the disk is full or not writable.
    """
    c, labels = run.c, run.data.classes or None
    weights = {name: np.asarray(run.frozen[name]) for name in c.shapes()}
    huggingface.write_model(folder, c, weights, labels=labels, kept=run.base.generation_settings)
    copy_tokenizer(run.base, folder)
