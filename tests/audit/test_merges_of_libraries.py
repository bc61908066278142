"""No false alarm: what PEFT and mlx-lm merge, in all dtypes and ways, is judged right."""

from itertools import product

import ml_dtypes
import numpy as np
import pytest
from extras import needs, optional
from made import DTYPES, Stored, change, weight

from minilora.audit.change import Change
from minilora.audit.floats import BF16, F32
from minilora.audit.judge import judge
from minilora.spec.lora import LORA
from minilora.spec.variants import DORA, LORA_BIAS

pytestmark = pytest.mark.slow

EFFECTS = ((1, 1e-4), (4, 1.0), (64, 1e-5))
"""Ranks with the size of B: effects from far below the weights to far above."""


def to_numpy(tensor):
    torch = optional("torch")
    tensor = tensor.detach().clone()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def network(torch):
    """A layer of each kind that PEFT's LoRA adapts."""
    from transformers.pytorch_utils import Conv1D

    nn = torch.nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.square = nn.Linear(48, 80), nn.Linear(64, 64, bias=False)
            self.table, self.turned = nn.Embedding(100, 32), Conv1D(60, 36)
            self.conv1, self.conv2 = nn.Conv1d(8, 12, 5), nn.Conv2d(8, 12, 3)
            self.conv3, self.point = nn.Conv3d(4, 6, (2, 3, 3)), nn.Conv2d(16, 24, 1)

    return Network()


KINDS = {"table": "embedding", "conv1": "conv", "conv2": "conv", "conv3": "conv", "point": "conv"}


def changes_of(name, layer, adapters):
    """The layer's changes, as the audit reads them of a file."""
    found = []
    for adapter in adapters:
        if name == "table":
            A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        parts = {"A": to_numpy(A), "B": to_numpy(B)}
        parts = {part: value.reshape(len(value), -1) for part, value in parts.items()}
        variant = LORA
        if adapter in layer.lora_magnitude_vector:
            magnitude = to_numpy(layer.lora_magnitude_vector[adapter].weight)
            parts, variant = {**parts, "magnitude": magnitude.reshape(-1, 1)}, DORA
        turned = name in ("table", "turned")
        found.append(
            Change(
                name, name, parts, KINDS.get(name, "linear"), variant, layer.scaling[adapter],
                transposed=turned, adapter=adapter,
            )
        )  # fmt: skip
    return found


def peft_merges(base, adapter, count=1, twice=False, safe=False, std=1.0, r=4, **settings):
    """Merge by PEFT; yield each layer's name, its base, what PEFT made of it and the changes."""
    torch, peft = optional("torch"), optional("peft")
    torch.manual_seed(r)
    dtypes = {F32: torch.float32, np.dtype("float16"): torch.float16, BF16: torch.bfloat16}
    model = network(torch).to(dtypes[base])
    names = [n for n, _ in model.named_children()]
    if settings.get("lora_bias"):
        names = ["linear"]
    config = peft.LoraConfig(
        r=r, lora_alpha=1.7 * r, target_modules=names, init_lora_weights=False, **settings
    )
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=adapter is None)
    adapters = ["default", *(f"other{k}" for k in range(1, count))]
    for other in adapters[1:]:
        adapted.add_adapter(other, config, autocast_adapter_dtype=adapter is None)
    adapted.base_model.set_adapter(adapters)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(p.shape) * (std if "_B" in name else 0.3)
            new = p.float() * (1 + 0.1 * torch.randn(p.shape)) if "magnitude" in name else drawn
            p.data = new.to(p.dtype if adapter is None else dtypes[adapter])
    layers = {n.split(".")[-1]: m for n, m in adapted.named_modules() if hasattr(m, "scaling")}
    layers = {n: m for n, m in layers.items() if n in names}
    before = {n: to_numpy(m.base_layer.weight) for n, m in layers.items()}
    biases = {n: to_numpy(m.base_layer.bias) for n, m in layers.items() if n == "linear"}
    changes = {n: changes_of(n, m, adapters) for n, m in layers.items()}
    for _ in range(1 + twice):
        adapted.merge_adapter(adapters, safe_merge=safe)
    for n, m in layers.items():
        yield n, before[n], to_numpy(m.base_layer.weight), changes[n]
    if settings.get("lora_bias"):
        layer = layers["linear"]
        c = to_numpy(layer.lora_B["default"].bias).reshape(-1, 1)
        s = layer.scaling["default"]
        own = Change("linear", "linear", {"c": c}, "bias", LORA_BIAS, s)
        yield "bias", biases["linear"], to_numpy(layer.base_layer.bias), [own]


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora-bias": {"lora_bias": True},
    "three adapters": {"count": 3},
    "merged twice": {"twice": True},
}


@needs("peft", "transformers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_what_peft_merges_is_right(base, settings):
    for adapter, safe, (r, std) in product((None, *DTYPES), (False, True), EFFECTS):
        given = {"safe": safe, "r": r, "std": std, **settings}
        for name, W, M, changes in peft_merges(base, adapter, **given):
            entry = judge(Stored(W), Stored(M), changes)
            assert entry.severity in ("ok", "warning"), (name, adapter, given, entry)


@needs("peft", "transformers")
@pytest.mark.filterwarnings("ignore")
def test_what_peft_merges_is_wrong_with_another_scale():
    for name, W, M, changes in peft_merges(BF16, None):
        wrong = [Change(**{**vars(c), "scale": 1.2 * c.scale}) for c in changes]
        assert judge(Stored(W), Stored(M), wrong).verdict == "factor", name


@needs("mlx", "mlx_lm")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("base", DTYPES, ids=str)
def test_what_mlx_lm_fuses_is_right(base, adapter):
    mx = optional("mlx.core")
    from mlx.nn import Linear
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    names = {F32: mx.float32, BF16: mx.bfloat16, np.dtype("float16"): mx.float16}

    def to_mlx(array):
        return mx.array(array.astype(F32)).astype(names[array.dtype])

    rng = np.random.default_rng(9)
    for r, size in EFFECTS:
        W = weight(rng, 48, 64, base, 0.05)
        c = change(rng, 48, 64, r, adapter, size, 1.7)
        linear = Linear(64, 48, bias=False)
        linear.weight = to_mlx(W)
        magnitude = np.sqrt((W.astype(float) ** 2).sum(1)) * (1 + 0.1 * rng.random(48))
        for kind in (LoRALinear, DoRALinear):
            layer = kind.from_base(linear, r=r, scale=c.scale)
            layer.lora_a, layer.lora_b = to_mlx(c.parts["A"].T), to_mlx(c.parts["B"].T)
            own = c
            if kind is DoRALinear:
                layer.m = to_mlx(magnitude.astype(adapter))
                parts = {**c.parts, "magnitude": magnitude.astype(adapter).reshape(-1, 1)}
                own = Change(**{**vars(c), "parts": parts, "variant": DORA})
            fused = layer.fuse().weight
            M = np.array(fused.astype(mx.float32)).astype(W.dtype)
            entry = judge(Stored(W), Stored(M), [own])
            assert entry.severity in ("ok", "warning"), (kind, r, size, entry)
