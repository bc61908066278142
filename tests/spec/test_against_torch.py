"""Every operation and every block against PyTorch's autograd in float64.

The other side is written by the textbook from PyTorch's own functions, in its layout: (batch,
tokens, features), heads before tokens, rotations as complex numbers, grouped heads and masks left
to its attention.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, OPTIMIZER, greatest, record_worst, relative_error
from extras import optional
from hypothesis import given, settings
from marks import examples

import minilora as ml
from minilora import testing as draw
from minilora.spec import blocks, lora, ops, optim

torch = optional("torch")
F = torch.nn.functional

FEW = examples(5)


def tensors(arrays, requires_grad=False):
    """Arrays as tensors of the same entries; anything else as it is."""
    return {
        name: torch.tensor(a, requires_grad=requires_grad) if isinstance(a, np.ndarray) else a
        for name, a in arrays.items()
    }


def turned(x, cos, sin):
    """x (…, d), its halves the real and imaginary parts, times cos + i sin."""
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
    return torch.cat([z.real, z.imag], dim=-1)


def rope(x, cos, sin):
    return turned(x.mT, cos.mT, sin.mT).mT


def cross_entropy(z, labels, count=None):
    if count is None:
        return F.cross_entropy(z.T, labels)
    return F.cross_entropy(z.T, labels, reduction="sum") / count


def attention(q, k, v, mask):
    return F.scaled_dot_product_attention(
        q.mT, k.mT, v.mT, attn_mask=mask.mT[:, None], enable_gqa=True
    ).mT


def lora_linear(x, A, B, W, b, s, K=None):
    branch = F.linear(F.linear(x.T if K is None else (K * x).T, A), B)
    return (F.linear(x.T, W, None if b is None else b[:, 0]) + s * branch).T


def by_matrix(D):
    """A layer y = W x + b + D (K ∘ x), where D is made of its parameters."""

    def layer(x, W, b, s, K=None, **parts):
        base = F.linear(x.T, W, None if b is None else b[:, 0])
        return (base + F.linear(x.T if K is None else (K * x).T, D(W, s, **parts))).T

    return layer


def rescaled(detached):
    """DoRA's D by PyTorch's own norm, through which nothing flows if it is ``detached``."""

    def D(W, s, A, B, magnitude):
        V = torch.addmm(W, B, A, alpha=s)
        norm = torch.linalg.vector_norm(V, dim=1, keepdim=True)
        return magnitude / (norm.detach() if detached else norm) * V - W

    return D


def rescaled_lora(x, A, B, magnitude, v, W, b, s, K=None):
    z = lora_linear(x, A, B, W, None, s, K)
    return magnitude / v * z if b is None else magnitude / v * z + b


def unfold(x, geometry):
    """PyTorch's own, over (batch, channels, …), whose padding is the same on both sides."""
    padded = F.pad(x.transpose(0, 1), [p for pair in reversed(geometry.padding) for p in pair])
    columns = F.unfold(padded, geometry.kernel, geometry.dilation, 0, geometry.stride)
    return columns.transpose(0, 1).flatten(1)


def conv(x, W, b, geometry, groups):
    padded = F.pad(x.transpose(0, 1), [p for pair in reversed(geometry.padding) for p in pair])
    y = F.conv2d(padded, W, b[:, 0], geometry.stride, 0, geometry.dilation, groups)
    return y.transpose(0, 1)


THEIRS = {
    "linear": lambda x, W, b=None: F.linear(x.T, W, None if b is None else b[:, 0]).T,
    "dropout": lambda x, K: x * 1 if K is None else x * K,
    "embedding": lambda E, ids: F.embedding(ids, E).T,
    "with_tokens": lambda rows, E, ids: E.index_copy(0, ids, rows),
    "rmsnorm": lambda x, w, eps: F.rms_norm(x.T, (len(x),), w[:, 0], eps).T,
    "layernorm": lambda x, w, b, eps: F.layer_norm(x.T, (len(x),), w[:, 0], b[:, 0], eps).T,
    "tanh": lambda x: torch.tanh(x),
    "silu": lambda x: F.silu(x),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "rope": rope,
    "softmax": lambda z: torch.softmax(z, dim=-2),
    "attention": attention,
    "cross_entropy": cross_entropy,
    "lora_linear": lora_linear,
    "lora_bias_linear": lambda c, s, **given: lora_linear(s=s, **given) + s * c,
    "row_norm": lambda V: torch.linalg.vector_norm(V, dim=1, keepdim=True),
    "rescaled_linear": by_matrix(
        lambda W, s, A, B, magnitude, v: magnitude / v * torch.addmm(W, B, A, alpha=s) - W
    ),
    "rescaled_lora_linear": rescaled_lora,
    "dora_linear": by_matrix(rescaled(detached=True)),
    "dora_full_linear": by_matrix(rescaled(detached=False)),
    "vera_linear": by_matrix(
        lambda W, s, A, B, lambda_d, lambda_b: (
            s * torch.diag(lambda_b[:, 0]) @ B @ torch.diag(lambda_d[:, 0]) @ A
        )
    ),
    "adalora_linear": by_matrix(lambda W, s, A, B, E: s * B @ torch.diag(E[:, 0]) @ A),
    "unfold": unfold,
    "block_diagonal": lambda W, groups: torch.block_diag(*W.chunk(groups)),
    "conv": conv,
}


def error_of_operation(operation, theirs):
    """The greatest error of y and the gradients, relative to them or, if greater, the inputs."""
    varying = tensors(operation.varying, requires_grad=True)
    y = theirs(**varying, **tensors(operation.constant))
    y.backward(torch.tensor(operation.dy))
    found_y, back = operation()
    found = {"y": found_y} | operation.gradients(back, operation.dy)
    wanted = {"y": y.detach()} | {name: v.grad for name, v in varying.items()}
    floor = max(map(greatest, (*operation.varying.values(), operation.dy)))
    return max(
        relative_error(found[name], want.numpy(), max(greatest(want.numpy()), floor))
        for name, want in wanted.items()
    )


@pytest.mark.parametrize("name", draw.OPERATIONS)
@FEW
@given(drawn=draw.operations())
def test_an_operation_is_pytorchs(name, drawn):
    error = error_of_operation(drawn[name], THEIRS[drawn[name].f.__name__])
    record_worst("5. PyTorch's autograd, primitive equations", error)
    assert error <= GRADIENT


def test_another_operation_is_not_pytorchs():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)
    assert error_of_operation(drawn["gelu"], THEIRS["gelu_tanh"]) > GRADIENT
    shifted = replace(drawn["layernorm"], constant={"eps": 0.3 * (1 + 1e-11)})
    assert (
        error_of_operation(shifted, lambda x, w, b, eps: THEIRS["layernorm"](x, w, b, 0.3))
        > GRADIENT
    )


def test_dora_with_its_norm_held_is_not_dora_with_its_norm_differentiated():
    drawn = draw.draw_operations(np.random.default_rng(0), 2, 3, 4, 1, 5)
    for one, other in (("dora_linear", "dora_full_linear"), ("dora_full_linear", "dora_linear")):
        assert error_of_operation(drawn[one], THEIRS[one]) <= GRADIENT
        assert error_of_operation(drawn[one], THEIRS[other]) > GRADIENT


class Textbook:
    """The parts of a block over x (b, t, d), of the parameters and adapters of one model."""

    def __init__(self, model, W):
        self.W, self.c, self.tuning = W, model.config, model.tuning
        self.b, self.t = model.batch.ids.shape
        self.real = torch.tensor(model.batch.real)
        self.positions = torch.tensor(model.batch.position_ids)

    def project(self, x, at):
        at = f"layers.0.{at}"
        bias = self.W.get(f"{at}.bias")
        y = F.linear(x, self.W[f"{at}.weight"], None if bias is None else bias[:, 0])
        K = self.tuning.dropout_scale.get(at)
        if K is not None:
            x = x * torch.tensor(K).T.reshape(self.b, self.t, -1)
        return y + self.tuning.scale[at] * F.linear(
            F.linear(x, self.W[f"{at}.A"]), self.W[f"{at}.B"]
        )

    def rms_norm(self, x, at):
        return F.rms_norm(x, x.shape[-1:], self.W[f"layers.0.{at}.weight"][:, 0], self.c.eps)

    def layer_norm(self, x, at):
        weight, bias = (self.W[f"layers.0.{at}.{part}"][:, 0] for part in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.c.eps)

    def heads(self, x, count):
        return x.view(self.b, self.t, count, -1).transpose(1, 2)

    def attend(self, q, k, v, causal):
        mask = self.real[:, None, :].expand(-1, self.t, -1)
        if causal:
            mask = mask & torch.ones(self.t, self.t, dtype=torch.bool).tril()
        mask = mask | torch.eye(self.t, dtype=torch.bool)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
        return a.transpose(1, 2).reshape(self.b, self.t, -1)

    def llama(self, x):
        h = self.rms_norm(x, "norm1")
        i = torch.arange(self.c.head_dim // 2, dtype=torch.float64)
        angles = self.positions[..., None] * torch.exp(
            -2 * i / self.c.head_dim * math.log(self.c.theta)
        )
        cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
        q = turned(self.heads(self.project(h, "q"), self.c.heads), cos, sin)
        k = turned(self.heads(self.project(h, "k"), self.c.kv_heads), cos, sin)
        v = self.heads(self.project(h, "v"), self.c.kv_heads)
        x = x + self.project(self.attend(q, k, v, causal=True), "o")
        h = self.rms_norm(x, "norm2")
        return x + self.project(F.silu(self.project(h, "gate")) * self.project(h, "up"), "down")

    def gpt2(self, x):
        qkv = self.project(self.layer_norm(x, "norm1"), "qkv").chunk(3, dim=-1)
        a = self.attend(*(self.heads(part, self.c.heads) for part in qkv), causal=True)
        x = x + self.project(a, "o")
        h = self.project(self.layer_norm(x, "norm2"), "up")
        return x + self.project(F.gelu(h, approximate="tanh"), "down")

    def bert(self, x):
        q, k, v = (self.heads(self.project(x, at), self.c.heads) for at in "qkv")
        x = self.layer_norm(x + self.project(self.attend(q, k, v, causal=False), "o"), "norm1")
        return self.layer_norm(x + self.project(F.gelu(self.project(x, "up")), "down"), "norm2")


def ours(model, x):
    """The block at layers.0 of the model."""
    c, real = model.config, model.batch.real
    arguments = x, "layers.0.", model.W, c, model.tuning
    if isinstance(c, ml.Llama):
        tables = ops.rope_tables(model.batch.position_ids, c.head_dim, c.theta, x.dtype)
        return blocks.llama_block(*arguments, tables, ops.causal_mask(real), ops.attention)
    if isinstance(c, ml.GPT2):
        return blocks.gpt2_block(*arguments, ops.causal_mask(real), ops.attention)
    return blocks.bert_block(*arguments, ops.padding_mask(real), ops.attention)


def error_of_block(model, rng):
    """The greatest error of y, dx and the gradients, relative to the greatest entry of all."""
    b, t = model.batch.ids.shape
    x, dy = rng.standard_normal((2, model.config.d, b * t))
    y, back = ours(model, x)
    dx, gradients = back(dy)
    found = {"y": y, "dx": dx} | gradients

    W = tensors({n: w for n, w in model.W.items() if n.startswith("layers.0.")}, requires_grad=True)
    inputs = torch.tensor(x.T.reshape(b, t, -1), requires_grad=True)
    outputs = getattr(Textbook(model, W), type(model.config).__name__.lower())(inputs)
    outputs.backward(torch.tensor(dy.T.reshape(b, t, -1)))
    wanted = {
        n: v.detach().numpy().reshape(b * t, -1).T for n, v in (("y", outputs), ("dx", inputs.grad))
    }
    wanted |= {name: w.grad.numpy() for name, w in W.items()}
    assert found.keys() == wanted.keys()
    scale = max(map(greatest, wanted.values()))
    return max(relative_error(found[name], want, scale) for name, want in wanted.items())


@pytest.mark.parametrize("architecture", [ml.Llama, ml.GPT2, ml.Bert])
def test_a_block_is_pytorchs(architecture):
    @FEW
    @given(model=draw.model_cases((architecture,), train_base=True), rng=draw.generators())
    def every(model, rng):
        error = error_of_block(model, rng)
        record_worst("5. PyTorch's autograd, blocks", error)
        assert error <= GRADIENT

    every()


@pytest.mark.parametrize(
    ("architecture", "module", "name", "wrong"),
    [
        (ml.Llama, ops, "silu", ops.gelu),
        (ml.GPT2, ops, "gelu_tanh", ops.gelu),
        (ml.Bert, lora, "dropout", lambda x, K: (x, lambda dy: dy)),
    ],
)
def test_a_block_with_a_wrong_part_is_not_pytorchs(architecture, module, name, wrong, monkeypatch):
    rng = np.random.default_rng(0)
    c = {
        ml.Llama: ml.Llama(11, 5, 1, heads=4, ffn=7, kv_heads=2, head_dim=2),
        ml.GPT2: ml.GPT2(11, 6, 1, heads=3, ffn=7, positions=9),
        ml.Bert: ml.Bert(11, 6, 1, heads=3, ffn=7, positions=9, types=2, classes=3),
    }[architecture]
    model = draw.draw_model(c, rng, train_base=True)
    assert error_of_block(model, rng) <= GRADIENT
    monkeypatch.setattr(module, name, wrong)
    assert error_of_block(model, rng) > GRADIENT


N = 10
SHAPES = {"a.A": (2, 5), "a.B": (4, 2), "b.A": (3, 4), "b.B": (7, 3), "b.bias": (7, 1)}
PARAMS = {name: np.random.default_rng(0).standard_normal(shape) for name, shape in SHAPES.items()}
GRADIENTS = draw.stored_gradients(PARAMS, N)
COMMON = {"lr": 0.02, "max_grad_norm": 1.0, "warmup_steps": 3, "total_steps": 12}
RUNS = {
    "AdamW": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "schedule": "cosine"},
    "AdamW by default": {"schedule": "linear"},
    "LoRA+": {"loraplus_lr_ratio": 16.0, "schedule": "linear"},
    "SGD": {"optimizer": "sgd", "schedule": "constant"},
    "SGD with momentum": {
        "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "schedule": "cosine",
    },
}  # fmt: skip


def factor_on_the_rate(settings):
    """Warm-up from 0, then the whole rate, a straight line to 0, or half a wave of the cosine."""
    warmup, total = settings["warmup_steps"], settings["total_steps"]
    kinds = {
        "constant": lambda q: 1.0,
        "linear": lambda q: 1 - q,
        "cosine": lambda q: (1 + math.cos(math.pi * q)) / 2,
    }
    return lambda k: (
        k / warmup if k < warmup else kinds[settings["schedule"]]((k - warmup) / (total - warmup))
    )


def torch_run(params, gradients, settings):
    """The parameters after each step of PyTorch's clipping, optimizer and scheduler."""
    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    ratio = settings.get("loraplus_lr_ratio", 1.0)
    groups = [
        {"params": [p], "lr": settings["lr"] * (ratio if name.endswith(".B") else 1.0)}
        for name, p in tensors.items()
    ]
    names = ("betas", "eps", "momentum", "weight_decay")
    options = {name: settings[name] for name in names if name in settings}
    kind = torch.optim.SGD if settings.get("optimizer") == "sgd" else torch.optim.AdamW
    optimizer = kind(groups, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_on_the_rate(settings))
    for g in gradients:
        for name, p in tensors.items():
            p.grad = torch.tensor(g[name])
        torch.nn.utils.clip_grad_norm_(tensors.values(), settings["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        yield {name: p.detach().numpy().copy() for name, p in tensors.items()}


def error_of_run(settings, gradients, run=optim.run):
    steps = zip(
        run(PARAMS, gradients, settings), torch_run(PARAMS, gradients, settings), strict=True
    )
    return max(relative_error(mine[n], theirs[n]) for mine, theirs in steps for n in PARAMS)


@pytest.mark.parametrize("name", RUNS)
@FEW
@given(gradients=GRADIENTS)
def test_ten_steps_are_pytorchs(name, gradients):
    error = error_of_run(COMMON | RUNS[name], gradients)
    record_worst(f"7. ten steps of PyTorch's, {name}", error)
    assert error <= OPTIMIZER


@pytest.mark.parametrize("name", RUNS)
@settings(max_examples=1)
@given(gradients=GRADIENTS)
def test_ten_steps_at_a_rate_off_in_the_eighth_digit_are_not_pytorchs(name, gradients):
    def wrong(params, gradients, settings):
        return optim.run(params, gradients, settings | {"lr": settings["lr"] * (1 + 1e-8)})

    assert error_of_run(COMMON | RUNS[name], gradients, wrong) > OPTIMIZER
