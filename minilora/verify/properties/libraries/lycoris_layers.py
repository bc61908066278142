"""LoRA, and the DoRA whose norm is differentiated, on a kind of layer in LyCORIS."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import numpy as np

from minilora.verify.properties.layer_kinds import LayerCase
from minilora.verify.properties.libraries.torch_layers import (
    Base,
    LibraryAnswer,
    Unsupported,
    base_model,
    fill_base,
    fill_parts,
    fused_as_parts,
    layer_answers,
    moved_convolution,
    read_base,
    refusals,
)


def lycoris_layer(case: LayerCase, rng: np.random.Generator) -> LibraryAnswer:
    """LyCORIS rebuilds W' in each forward; what it drops is no input, so nothing is dropped."""
    if case.kind == "fused":
        return fused_as_parts(case, rng, lycoris_layer)
    case = case.without_dropout()
    if "geometry" in case.extra:  # in groups its A sees its own channels only
        case = moved_convolution(case, rng, plain=False, groups=False)
    try:
        locon = importlib.import_module("lycoris.modules.locon")
    except ImportError as error:
        raise Unsupported("lycoris-lora is not installed") from error
    library = f"lycoris {version('lycoris-lora')}"
    decomposed = "magnitude" in case.variant.parts
    with refusals(library):
        model = base_model(case, transposed=False).double()
        fill_base(case, model["layer"])
        layer = locon.LoConModule(
            "layer",
            model["layer"],
            lora_dim=case.r,
            alpha=case.alpha,
            weight_decompose=decomposed,
            wd_on_out=True,
        ).double()
    tensors = {"A": layer.lora_down.weight, "B": layer.lora_up.weight}
    tensors |= {"magnitude": layer.dora_scale} if decomposed else {}
    unpack = fill_parts(case, tensors, library)
    groups = " and groups" if "geometry" in case.extra else ""

    def merged() -> Base:
        layer.merge_to()
        return read_base(case, model["layer"])

    how = f"{library}, without dropout{groups}"
    return LibraryAnswer(case, layer_answers(case, model, layer, tensors, unpack), merged, how)
