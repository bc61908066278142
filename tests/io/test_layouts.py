"""PEFT's tensors of each kind of layer: there and back, and into PEFT's own modules."""

import numpy as np
import pytest
from calculus import same_bits
from extras import optional

from minilora.io.formats.peft.layers import from_tensors, refusal, to_tensors
from minilora.spec.variants import REGISTRY
from minilora.verify.properties.layer_kinds import KINDS, draw_case

ENTRIES = ("lora", "lora-bias", "dora", "vera", "adalora")
CELLS = [
    (entry, kind)
    for entry in ENTRIES
    for kind in KINDS
    if kind not in REGISTRY[entry].lacks and not refusal(REGISTRY[entry].variant, kind)
]
REFUSED = [
    (entry, kind)
    for entry in ENTRIES
    for kind in KINDS
    if kind not in REGISTRY[entry].lacks and (entry, kind) not in CELLS
]


def drawn(entry, kind, square=False):
    case = draw_case(entry, kind, np.random.default_rng(0), exact=False, square=square)
    kernel = case.extra["geometry"].kernel if "geometry" in case.extra else ()
    return case, kernel, case.extra.get("rows", ())


def came_back(case, tensors, rows):
    parts = from_tensors(case.variant, case.kind, tensors, len(case.P), rows)
    return len(parts) == len(case.P) and all(
        same_bits(a, b)
        for P, Q in zip(parts, case.P, strict=True)
        for a, b in zip(P, Q, strict=True)
    )


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("entry", "kind"), CELLS)
def test_an_adapter_comes_back_from_its_tensors_bit_for_bit(entry, kind, square):
    case, kernel, rows = drawn(entry, kind, square)
    tensors = to_tensors(case.variant, kind, case.P, kernel, rows)
    assert came_back(case, tensors, rows)
    changed = {name: v if v.ndim < 2 else v[::-1] for name, v in tensors.items()}
    try:
        assert not came_back(case, changed, rows)
    except ValueError:
        assert kind == "fused"  # whose blocks are then no longer on the diagonal


@pytest.mark.parametrize(("entry", "kind"), REFUSED)
def test_what_peft_cannot_say_is_refused_with_the_reason(entry, kind):
    case, kernel, rows = drawn(entry, kind)
    for act in (to_tensors, from_tensors):
        with pytest.raises(ValueError, match="PEFT"):
            act(case.variant, kind, case.P if act is to_tensors else {}, kernel, rows)


def test_a_tensor_missing_or_left_over_is_named():
    case, *_ = drawn("dora", "linear")
    tensors = to_tensors(case.variant, "linear", case.P)
    left = {"lora_B.bias": np.zeros(3)} | {n: v for n, v in tensors.items() if "_A" not in n}
    with pytest.raises(ValueError, match=r"tensors \['lora_A.weight', 'lora_B.bias'\]: expected"):
        from_tensors(case.variant, "linear", left)


def test_a_fused_adapter_that_mixes_its_parts_is_refused():
    case, _, rows = drawn("lora", "fused")
    tensors = to_tensors(case.variant, "fused", case.P, (), rows)
    for row, column in ((0, -1), (rows[0], 0), (-1, 0)):
        B = tensors["lora_B.weight"].copy()
        B[row, column] = 1e-300
        with pytest.raises(ValueError, match="B is not block-diagonal"):
            from_tensors(case.variant, "fused", tensors | {"lora_B.weight": B}, 2, rows)


def module(torch, kind, case):
    """The layer of this kind in a model of its own."""
    nn = torch.nn

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(case.W.shape))

    def conv(layer):
        m, c, *kernel = case.W.shape
        groups = case.extra["groups"]
        return layer(c * groups, m, tuple(kernel), groups=groups)

    def transposed():
        from transformers.pytorch_utils import Conv1D

        return Conv1D(*case.W.shape[::-1])

    return {
        "linear": lambda: nn.Linear(*case.W.shape[::-1]),
        "tied": lambda: nn.Linear(*case.W.shape[::-1]),
        "fused": lambda: nn.Linear(*case.W.shape[::-1]),
        "transposed": transposed,
        "embedding": lambda: nn.Embedding(*case.W.shape),
        "experts": Experts,
        "conv1": lambda: conv(nn.Conv1d),
        "conv2": lambda: conv(nn.Conv2d),
    }[kind]()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape")  # a finding: it is a bias
@pytest.mark.parametrize(("entry", "kind"), CELLS)
def test_pefts_modules_have_these_tensors(entry, kind):
    torch = optional("torch")
    peft = optional("peft")
    case, kernel, rows = drawn(entry, kind)
    where = {"target_parameters": ["0.w"]} if kind == "experts" else {"target_modules": ["0"]}
    options = {"lora-bias": {"lora_bias": True}, "dora": {"use_dora": True}}.get(entry, {})
    r = 2 * case.r if kind == "fused" else case.r
    if kind == "transposed":
        options |= {"fan_in_fan_out": True}
    config = {
        "vera": lambda: peft.VeraConfig(r=r, **where, **options),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=r, target_r=r, total_step=9, **where, **options
        ),
    }.get(entry, lambda: peft.LoraConfig(r=r, **where, **options))()
    model = peft.get_peft_model(torch.nn.Sequential(module(torch, kind, case)), config)
    theirs = {
        name.rpartition("model.0.")[2].removeprefix("base_model."): tuple(v.shape)
        for name, v in peft.get_peft_model_state_dict(model).items()
    }
    ours = to_tensors(case.variant, kind, case.P, kernel, rows)
    assert {name: v.shape for name, v in ours.items()} == theirs
