"""What was found in real libraries: where they deviate, and what is right by algebra.

A test is a finding. Its name is the sentence, its docstring says in which release that was seen,
and its body is the smallest reproduction, which `docs/findings.md` shows. It passes while the
library still does so. One that fails after an upgrade is good news, most likely: the library
behaves otherwise. Look what it does now; if it is right, take the finding out here and there.

The arguments named like libraries are these libraries. All numbers are chosen such that nothing
rounds but what the finding is about, so that `==` decides.
"""

import importlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import Batch, Tuning, logits, lora_linear, merge, scale, unmerge
from minilora.formats.huggingface import read_model
from minilora.lora import merge_weight
from minilora.ops import attention, cross_entropy, embedding, linear, rmsnorm, rope_tables
from minilora.optim import adamw, loraplus_rates, schedule, AdamState

NEEDED = "the peers need it: pip install 'minilora[peers]'"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=NEEDED)


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip("transformers", reason=NEEDED)


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft", reason=NEEDED)


@pytest.fixture(scope="module")
def loralib(torch):
    return pytest.importorskip("loralib", reason=NEEDED)
