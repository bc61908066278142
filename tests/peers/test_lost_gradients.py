"""A gradient that a library of PyTorch loses is a deviation: no peer makes up for it."""

import pytest
from extras import optional

from minilora.verify import engine
from minilora.verify.checks.registry import CHECKS

torch = optional("torch")

from minilora.verify.peers._torch import to_torch  # noqa: E402
from minilora.verify.peers._torch_linear import Built, TorchLinear  # noqa: E402


def library(lost):
    """A layer of PyTorch in which A or B is detached, or not trained."""

    class Layer(TorchLinear):
        dtypes = ("float64", "float32")

        def build(self, W, *, alpha, r, bias=False):
            base = torch.nn.Linear(*W.shape[::-1], bias=bias).requires_grad_(False)
            of = {"A": torch.nn.Linear(W.shape[1], r, False)}
            of["B"] = torch.nn.Linear(r, W.shape[0], False)
            for each in (base, *of.values()):
                each.to(to_torch(W).dtype)
            for name in lost.get("frozen", ""):
                of[name].requires_grad_(False)
            weights = {name: layer.weight for name, layer in of.items()}

            def forward(x):
                A, B = (
                    w.detach() if name in lost.get("detached", "") else w
                    for name, w in weights.items()
                )
                return base(x) + alpha / r * (x @ A.T @ B.T)

            parameters = {"W": base.weight, **weights} | ({"bias": base.bias} if bias else {})
            return Built(forward, parameters, lambda: base.weight, {})

    return Layer()


def names_of(lost):
    (check,) = (check for check in CHECKS if check.id == "linear.vjp")
    report = engine.run([check], library(lost), profile="quick", dtypes=["float32"])
    return [(r.status, [each.id for each in r.diagnosis]) for r in report.results]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "name"),
    [
        ({"detached": "A"}, "backward-dA-zero"),
        ({"frozen": "A"}, "backward-dA-zero"),
        ({"frozen": "B"}, "backward-dB-zero"),
        ({"detached": "AB"}, "backward-all-zero"),
        ({"frozen": "AB"}, "backward-all-zero"),
    ],
)
def test_a_parameter_that_is_not_trained_is_caught_and_named(lost, name):
    assert names_of(lost) == [("fail", [name])]


def test_a_layer_that_trains_both_passes():
    assert names_of({}) == [("pass", [])]
