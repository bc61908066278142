"""The tiny trained models that come with this package: where they are and what they have learned.

``<name>/base`` is a Hugging Face model folder, trained on the first of two tasks, and
``<name>/adapter`` a PEFT adapter of it, trained on the second. See the ``README.md`` beside them;
``build.py`` there trains them again.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from minilora.spec.models import Batch
from minilora.spec.ops import Array

MANIFEST = "manifest.json"


@cache
def folder() -> Path:
    """The folder ``reference_models``: inside an installed package, or beside it in a checkout.

    Errors: FileNotFoundError if it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = [parent / "reference_models" for parent in (package, package.parent)]
    for place in places:
        if (place / MANIFEST).is_file():
            return place
    raise FileNotFoundError(
        f"no reference models: found {MANIFEST} in neither {places[0]} nor {places[1]}; "
        "install minilora again, or run reference_models/build.py in a checkout"
    )


@cache
def manifest() -> dict[str, Any]:
    """The contents of ``manifest.json``: the models, what they learned, a hash of every file."""
    contents: dict[str, Any] = json.loads((folder() / MANIFEST).read_text("utf-8"))
    return contents


def names() -> tuple[str, ...]:
    """The models' names."""
    return tuple(manifest()["models"])


def tasks(name: str) -> tuple[str, str]:
    """The tasks that the model and its adapter have learned, as `synthetic_data` names them.

    Errors: ValueError for an unknown model.
    """
    if name not in names():
        raise ValueError(f"reference model {name!r}: expected one of {', '.join(names())}")
    first, second = manifest()["models"][name]["tasks"]
    return first, second


def vector(name: str) -> tuple[Batch, dict[str, Array]]:
    """The stored batch of a model with its adapter, and what is expected of it in float64.

    Expected are ``loss``, ``logits`` and ``grads.<tensor>``, by the adapter file's names of its
    tensors. Logits are (b, t, v) and 0 at padding, or (b, classes).
    """
    stored: dict[str, Array] = load_file(folder() / "vectors" / f"{name}.safetensors")
    inputs = ("input_ids", "labels", "attention_mask", "token_type_ids")
    ids, labels, mask, types = (stored.pop(key, None) for key in inputs)
    assert ids is not None
    assert mask is not None
    return Batch(ids, labels, mask.astype(bool), types=types), stored
