"""Mutants of optimizers, clipping, schedules and gradient accumulation."""

from __future__ import annotations

from typing import Any

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.optimizer import Optimizer


def clipped(g: dict[str, Array], max_norm: float) -> dict[str, Any]:
    """The gradients scaled to at most a norm."""
    norm = sum((x**2).sum() for x in g.values()) ** 0.5
    return {name: x * min(1.0, max_norm / (norm + 1e-6)) for name, x in g.items()}


def overwritten(steps: list[dict[str, Array]], params: dict[str, Array]) -> list[Any]:
    """The steps, and the parameters that were handed in changed to the last of them."""
    for name, array in params.items():
        array[...] = steps[-1][name]
    return steps


OPTIMIZER = Reference((Optimizer,), {"clipped": clipped, "overwritten": overwritten})

# fmt: off
ADAMW: Table = {
    "optimizer.adamw": [
        ("betas-swapped", "β₂, β₁ for β₁, β₂", {"# settings": "beta1, beta2 = beta2, beta1"}),
        ("beta1-fixed", "β₁ = 0.9", {"# settings": "beta1 = 0.9"}),
        ("beta2-fixed", "β₂ = 0.999", {"# settings": "beta2 = 0.999"}),
        ("one-beta", "β₁ for β₂ too", {"# settings": "beta2 = beta1"}),
        ("eps-fixed", "ε = 1e-8", {"# settings": "eps = 1e-8"}),
        ("rate-fixed", "η = 1e-3", {"# settings": "lr = 1e-3"}),
        ("decay-none", "λ = 0", {"# settings": "weight_decay = 0.0"}),
        ("decay-coupled", "g + λ p in m and v",
         {"m[name] = beta1": "grad = grad + decay * w; decay = 0; m[name] = beta1"}),
        ("decay-without-rate", "(1 - λ) p", {"w * (1 - rate * decay)": "w * (1 - decay)"}),
        ("decay-after", "(1 - ηλ) (p - η m̂ / (√v̂ + ε))",
         {"w * (1 - rate * decay) - rate * direction":
              "(w - rate * direction) * (1 - rate * decay)"}),
        ("decay-added", "(1 + ηλ) p", {"# settings": "weight_decay = -weight_decay"}),
        ("eps-in-root", "m̂ / √(v̂ + ε)",
         {"m_hat / (v_hat**0.5 + eps)": "m_hat / (v_hat + eps) ** 0.5"}),
        ("eps-squared-in-root", "m̂ / √(v̂ + ε²)",
         {"m_hat / (v_hat**0.5 + eps)": "m_hat / (v_hat + eps**2) ** 0.5"}),
        ("eps-before-correction", "m̂ / ((√v + ε) / √(1 - β₂ᵗ))",
         {"m_hat / (v_hat**0.5 + eps)": "m_hat / (v_hat**0.5 + eps / (1 - beta2**t) ** 0.5)"}),
        ("eps-none", "m̂ / √v̂", {"# settings": "eps = 0.0"}),
        ("no-root", "m̂ / (v̂ + ε)", {"m_hat / (v_hat**0.5 + eps)": "m_hat / (v_hat + eps)"}),
        ("sign", "sign(m̂)", {"m_hat / (v_hat**0.5 + eps)": "np.sign(m_hat)"}),
        ("m-alone", "(1 - ηλ) p - η m̂", {"m_hat / (v_hat**0.5 + eps)": "m_hat"}),
        ("sgd", "(1 - ηλ) p - η g", {"- rate * direction": "- rate * grad"}),
        ("t-from-0", "bias correction with t from 0", {"k + 1": "k"}),
        ("t-from-2", "bias correction with t from 2", {"k + 1": "k + 2"}),
        ("t-of-parameters", "t counts parameters, not steps", {"k + 1": "k * len(p) + 1"}),
        ("m-undamped", "m = β₁ m + g", {"(1 - beta1) * grad": "grad"}),
        ("v-undamped", "v = β₂ v + g²", {"(1 - beta2) * grad**2": "grad**2"}),
        ("v-of-tensor", "v of the mean of g² over a tensor",
         {"(1 - beta2) * grad**2": "(1 - beta2) * (grad**2).mean()"}),
        ("v-absolute", "v of |g|", {"(1 - beta2) * grad**2": "(1 - beta2) * abs(grad)"}),
        ("v-centred", "v of (g - m)²",
         {"(1 - beta2) * grad**2": "(1 - beta2) * (grad - m[name]) ** 2"}),
        ("v-squared-late", "(the mean of |g|)² for the mean of g²",
         {"(1 - beta2) * grad**2": "(1 - beta2) * abs(grad)",
          "v_hat = v[name]": "v_hat = v[name] ** 2"}),
        ("v-coarse", "v rounded to half of the dtype's digits",
         {"v_hat = v[name]": "v_hat = coarse(v[name], dtype)"}),
        ("amsgrad", "AMSGrad: the greatest v so far",
         {"v_hat = v[name]": "u[name] = np.maximum(u[name], v[name]); v_hat = u[name]"}),
        ("nesterov", "Nesterov: β₁ m + (1 - β₁) g for m",
         {"m_hat = m[name]": "m_hat = (beta1 * m[name] + (1 - beta1) * grad)"}),
        ("state-lost", "m and v from 0 in every step",
         {"m[name] / (1 - beta1**t)": "grad", "v[name] / (1 - beta2**t)": "grad**2"}),
        ("weights-bfloat16", "p rounded to bfloat16 after each step",
         {"# step": "new = digits(new, 8)"}),
        ("weights-coarse", "p rounded to half of the dtype's digits after each step",
         {"# step": "new = coarse(new, dtype)"}),
        ("ascent", "gradient ascent: p + η m̂ / (√v̂ + ε)",
         {"- rate * direction": "+ rate * direction"}),
        ("still-skipped", "no step where the whole gradient is 0",
         {"# parameter": "if not grad.any(): continue"}),
        ("first-step-skipped", "no first step", {"# parameter": "if k == 0: continue"}),
        ("steps-shared", "every entry is the last step",
         {"return steps": "return steps[-1:] * len(steps)"}),
        ("steps-late", "every entry is the step before",
         {"return steps": "return [params, *steps[:-1]]"}),
        ("params-overwritten", "the caller's parameters are overwritten",
         {"return steps": "return overwritten(steps, params)"}),
    ],
    "optimizer.adamw.defaults": [
        ("decay-default", "λ = 0.01 where 0 is asked for",
         {"# settings": "weight_decay = weight_decay or 0.01"}),
        ("not-corrected", "no bias correction: m / (√v + ε)",
         {"m[name] / (1 - beta1**t)": "m[name]", "v[name] / (1 - beta2**t)": "v[name]"}),
        ("m-not-corrected", "no bias correction of m: m / (√v̂ + ε)",
         {"m[name] / (1 - beta1**t)": "m[name]"}),
        ("v-not-corrected", "no bias correction of v: m̂ / (√v + ε)",
         {"v[name] / (1 - beta2**t)": "v[name]"}),
        ("correction-ends", "no bias correction from the eleventh step on",
         {"k + 1": "k + 1 if k < 10 else np.inf"}),
    ],
}
SGD: Table = {
    "optimizer.sgd": [
        ("sgd-no-momentum", "no momentum: u = g + λ p", {"# settings": "momentum = 0.0"}),
        ("sgd-damped", "damping: u = μ u + (1 - μ) (g + λ p)",
         {"+ (grad + decay * w)": "+ (1 - momentum) * (grad + decay * w)"}),
        ("sgd-first-damped", "the first step's u is μ times itself in the second",
         {"momentum * u[name] +": "momentum ** (1 + (k == 1)) * u[name] +"}),
        ("sgd-nesterov", "Nesterov: p - η (g + λ p + μ u)",
         {"w - rate * u[name]": "w - rate * (grad + decay * w + momentum * u[name])"}),
        ("sgd-decay-apart", "decoupled decay: (1 - ηλ) p - η u, no λ p in u",
         {"+ (grad + decay * w)": "+ grad",
          "w - rate * u[name]": "w * (1 - rate * decay) - rate * u[name]"}),
    ],
    "optimizer.sgd-balance": [
        ("decay-on-A", "λ = 0 for B", {"# parameter": 'decay = decay * name.endswith("A")'}),
        ("decay-on-B", "λ = 0 for A", {"# parameter": 'decay = decay * name.endswith("B")'}),
        ("A-frozen", "A is not trained",
         {"# parameter": 'rate = 0 if name.endswith("A") else rate'}),
        ("B-frozen", "B is not trained",
         {"# parameter": 'rate = rate if name.endswith("A") else 0'}),
    ],
}
CLIP: Table = {
    "optimizer.clip": [
        ("clip-none", "no clipping", {"min(1.0, max_norm / (norm + 1e-6))": "1.0"}),
        ("clip-none-adamw", "no clipping with AdamW",
         {"# settings": 'max_norm = np.inf if optimizer == "adamw" else max_norm'}),
        ("clip-per-tensor", "each gradient clipped by itself",
         {"x * clip": "clipped({n: x}, max_norm)[n]"}),
        ("clip-by-value", "each entry of g clipped to [-max, max]",
         {"x * clip": "x.clip(-max_norm, max_norm)"}),
        ("clip-always", "gradients below the maximum norm scaled up to it",
         {"min(1.0, max_norm / (norm + 1e-6))": "min(9.0, max_norm / norm)"}),
        ("clip-L1", "‖g‖ = Σ |g|",
         {"sum((x**2).sum() for x in g.values()) ** 0.5": "sum(abs(x).sum() for x in g.values())"}),
        ("clip-largest", "‖g‖ = max |g|",
         {"sum((x**2).sum() for x in g.values()) ** 0.5": "max(abs(x).max() for x in g.values())"}),
        ("clip-squared", "‖g‖² for ‖g‖",
         {"sum((x**2).sum() for x in g.values()) ** 0.5": "sum((x**2).sum() for x in g.values())"}),
        ("clip-sum-of-norms", "the sum of the tensors' norms for ‖g‖",
         {"sum((x**2).sum() for x in g.values()) ** 0.5":
              "sum((x**2).sum() ** 0.5 for x in g.values())"}),
        ("clip-root-mean-square", "‖g‖ / √(the number of entries)",
         {"sum((x**2).sum() for x in g.values()) ** 0.5":
              "(sum((x**2).sum() for x in g.values()) / sum(x.size for x in g.values())) ** 0.5"}),
        ("clip-last-tensor", "the last tensor's norm for ‖g‖",
         {"sum((x**2).sum() for x in g.values()) ** 0.5":
              "(list(g.values())[-1] ** 2).sum() ** 0.5"}),
        ("clip-A-alone", "the norm of the A's gradients for ‖g‖",
         {"sum((x**2).sum() for x in g.values()) ** 0.5":
              'sum((x**2).sum() for n, x in g.items() if n.endswith("A")) ** 0.5'}),
        ("clip-B-not-scaled", "the B's gradients are not clipped",
         {"x * clip": 'x if n.endswith("B") else x * clip'}),
    ],
}
SCHEDULE: Table = {
    "optimizer.linear-schedule": [
        ("schedule-none", "a constant rate η", {"# rate": "factor = 1.0"}),
        ("schedule-one-ahead", "the factor of step k + 1", {"step = k": "step = k + 1"}),
        ("schedule-one-behind", "the factor of step k - 1", {"step = k": "step = max(0, k - 1)"}),
        ("schedule-warmup-from-1", "(k + 1) / warmup", {"step = k": "step = k + (k < warmup)"}),
        ("schedule-no-warmup", "no warm-up", {"step = k": "step = max(k, warmup)"}),
        ("schedule-warmup-counted", "1 - k / total: the decay begins at step 0",
         {"# rate": 'factor = 1 - k / total if schedule == "linear" and k >= warmup else factor'}),
        ("schedule-one-step-shorter", "total - 1 steps instead of total",
         {"# settings": "total = max(1, total - 1)"}),
        ("schedule-one-step-longer", "total + 1 steps instead of total",
         {"# settings": "total = total + 1"}),
        ("schedule-cosine-for-linear", "the cosine schedule instead of the linear one",
         {"# settings": 'schedule = "cosine" if schedule == "linear" else schedule'}),
        ("schedule-A-alone", "the schedule applies to A alone",
         {"# parameter": 'rate = rate if name.endswith("A") else lr * ratio'}),
        ("schedule-decay-alone-constant", "the decay ηλ ignores the schedule",
         {"w * (1 - rate * decay)": "w * (1 - lr * decay)"}),
    ],
    "optimizer.cosine-schedule": [
        ("schedule-linear-for-cosine", "the linear schedule instead of the cosine one",
         {"# settings": 'schedule = "linear" if schedule == "cosine" else schedule'}),
        ("schedule-cosine-not-halved", "1 + cos πq for (1 + cos πq) / 2",
         {"# rate": 'factor *= 2 if schedule == "cosine" and k >= warmup else 1'}),
        ("schedule-cosine-not-squared", "cos (πq/2) for its square",
         {"# rate": 'factor **= 0.5 if schedule == "cosine" and k >= warmup else 1'}),
    ],
    "optimizer.cosine-schedule.past-end": [
        ("schedule-least-rate", "a rate of at least η / 100 after the warm-up",
         {"# rate": "factor = max(factor, 0.01) if k >= warmup else factor"}),
        ("schedule-cosine-rises-again", "the cosine rises again beyond the last step",
         {"# rate":
              "factor = (1 + np.cos(np.pi * (k - warmup) / (total - warmup))) / 2 if schedule "
              '== "cosine" and k >= warmup else factor'}, "transformers"),
    ],
}
LORAPLUS: Table = {
    "optimizer.loraplus.other-params": [
        ("loraplus-not-A", "the LoRA+ ratio for all parameters except A",
         {'name.endswith("B") else rate': 'not name.endswith(".A") else rate'}),
        ("loraplus-vectors", "the LoRA+ ratio for biases, too",
         {'name.endswith("B") else rate': 'name.endswith((".B", "bias")) else rate'}, "peft 0.21"),
        ("loraplus-capital-in-name", "the LoRA+ ratio for every name that contains B",
         {'name.endswith("B") else rate': '"B" in name else rate'}),
        ("loraplus-at-least-1", "a LoRA+ ratio below 1 taken for 1",
         {"# settings": "ratio = max(1.0, ratio)"}),
        ("loraplus-b-in-name", "the LoRA+ ratio for every name that contains b",
         {'name.endswith("B") else rate': '"b" in name.lower() else rate'}),
        ("decay-of-matrices", "λ = 0 for vectors",
         {"# parameter": "decay = decay * (w.ndim > 1)"}),
        ("loraplus-no-embedding", "no LoRA+ ratio for an embedding's B",
         {'name.endswith("B") else rate':
              'name.endswith(".B") and not name.startswith("embed") else rate'}),
    ],
    "optimizer.loraplus": [
        ("loraplus-not-square", "no LoRA+ ratio for a B of equal sides",
         {'name.endswith("B") else rate':
              'name.endswith(".B") and len({*w.shape}) > 1 else rate'}),
        ("loraplus-ignored", "no LoRA+ ratio", {"# settings": "ratio = 1.0"}),
        ("loraplus-on-A", "the LoRA+ ratio for A instead of B",
         {"# parameter": 'rate = lr * (ratio if name.endswith("A") else 1)'}),
        ("loraplus-on-both", "the LoRA+ ratio for A, too", {"# parameter": "rate = lr * ratio"}),
        ("loraplus-A-divided", "A's rate divided by the LoRA+ ratio, B's not multiplied",
         {"# parameter": 'rate = lr / (ratio if name.endswith("A") else 1)'}),
        ("loraplus-B-not-decayed", "λ = 0 for B with LoRA+",
         {"# parameter": 'decay = 0 if "loraplus_lr_ratio" in settings and name.endswith("B") '
                         "else decay"}),
        ("loraplus-not-decayed", "λ = 0 with LoRA+, whose groups set it",
         {"# settings": 'weight_decay = 0 if "loraplus_lr_ratio" in settings else weight_decay'},
         "peft's create_loraplus_optimizer, given weight_decay"),
        ("loraplus-not-in-decay", "B's decay without the LoRA+ ratio",
         {"w * (1 - rate * decay)": "w * (1 - lr * factor * decay)"}),
    ],
}
SIZES: Table = {
    "optimizer.all": [
        ("beyond-1024", "the first 1024 numbers of a parameter alone are updated",
         {"# step": "new = np.where(np.arange(w.size).reshape(w.shape) < 1024, new, w)"}),
        ("decay-ends", "no decay from the 33rd step on",
         {"# parameter": "decay = decay * (k < 32)"}),
        ("one-not-clipped", "a single parameter is not clipped",
         {"# rate": "g = g if len(p) > 1 else self.accumulated(item, max_norm)"}),
    ],
}
ACCUMULATE: Table = {
    "optimizer.gradient-accumulation": [
        ("accumulate-mean-of-means", "the mean of the micro-batches' gradients gᵢ",
         {"[x / sum(n) for x in n]":
              "[1 / len(n)] * len(n)"}, "transformers 34191", "mlx-lm 1413", "torchtune 1875"),
        ("accumulate-sum", "the sum of the micro-batches' gradients gᵢ",
         {"[x / sum(n) for x in n]": "[1] * len(n)"}),
        ("accumulate-sum-over-labels", "Σ nᵢ gᵢ", {"[x / sum(n) for x in n]": "n"}),
        ("accumulate-by-parts", "Σ nᵢ gᵢ / the number of micro-batches",
         {"[x / sum(n) for x in n]": "[x / len(n) for x in n]"}),
        ("accumulate-by-both", "Σ nᵢ gᵢ / (N times the number of micro-batches)",
         {"[x / sum(n) for x in n]": "[x / sum(n) / len(n) for x in n]"}),
        ("accumulate-one-at-least", "nᵢ = 0 taken for 1",
         {"[x / sum(n) for x in n]": "[max(x, 1) / sum(max(y, 1) for y in n) for x in n]"}),
        ("accumulate-labels-of-a-byte", "N modulo 256",
         {"[x / sum(n) for x in n]": "[x / (sum(n) % 256) for x in n]"}),
        ("accumulate-momentum-default", "μ = 0.9 where none is asked for",
         {"# settings": "momentum = momentum or 0.9"}),
        ("accumulate-empty-parts-count", "a part without labels makes the step smaller",
         {"[x / sum(n) for x in n]": "[x / sum(n) * np.count_nonzero(n) / len(n) for x in n]"}),
        ("accumulate-last-part", "the last micro-batch's gradient alone",
         {"[x / sum(n) for x in n]": "[0] * (len(n) - 1) + [1]"}),
        ("accumulate-first-part", "the first micro-batch's gradient alone",
         {"[x / sum(n) for x in n]": "[1] + [0] * (len(n) - 1)"}),
        ("accumulate-last-part-lost", "all micro-batches except the last",
         {"[x / sum(n) for x in n]": "[x / sum(n) for x in n[:-1]] + [0]"}),
        ("accumulate-weights-turned", "the nᵢ in reverse order",
         {"[x / sum(n) for x in n]": "[x / sum(n) for x in n[::-1]]"}),
        ("accumulate-each-part-clipped", "each gᵢ clipped before the mean",
         {"# micro-batches": "parts = [clipped(part, max_norm) for part in parts]"}),
    ],
}
SAME: Same = [
    ("rows", "the reference", {}),
    ("one-rate", "η / (1 - β₁ᵗ) m / (√v / √(1 - β₂ᵗ) + ε)",
     {"- rate * direction":
          "- rate / (1 - beta1**t) * m[name] / (v[name] ** 0.5 / (1 - beta2**t) ** 0.5 + eps)"}),
    ("towards", "m + (1 - β₁) (g - m), v + (1 - β₂) (g² - v)",
     {"beta1 * m[name] + (1 - beta1) * grad": "m[name] + (1 - beta1) * (grad - m[name])",
      "beta2 * v[name] + (1 - beta2) * grad**2": "v[name] + (1 - beta2) * (grad**2 - v[name])"}),
    ("decay-subtracted", "p - ηλ p", {"w * (1 - rate * decay)": "w - rate * decay * w"}),
    ("labels-last", "(Σ nᵢ gᵢ) / N",
     {"[x / sum(n) for x in n]": "n", "for name in parts[0]}": "/ sum(n) for name in parts[0]}"}),
    ("clip-divided", "g / max(1, ‖g‖ / max)",
     {"x * clip": "x / max(1.0, (norm + 1e-6) / max_norm)"}),
    ("cosine", "(1 + cos πq) / 2",
     {"# rate":
          "factor = (1 + np.cos(np.pi * (min(k, total) - warmup) / (total - warmup))) / 2 if "
          'schedule == "cosine" and k >= warmup else factor'}),
    ("stored", "parameters and running means kept in the dtype",
     {"# step": "new = narrow(new, dtype)",
      "t = k + 1": "m[name], v[name] = narrow(m[name], dtype), narrow(v[name], dtype); t = k + 1"}),
]
TOGETHER: Table = {
    "optimizer.sgd.linear-schedule": [
        ("schedule-in-velocity", "the rate in the velocity: u = μ u + η (g + λ p)",
         {"+ (grad + decay * w)": "+ rate * (grad + decay * w)",
          "w - rate * u[name]": "w - u[name]"}),
        ("schedule-ahead-without-warmup", "the factor of step k + 1 where there is no warm-up",
         {"step = k": 'step = k + (not warmup and schedule != "constant")'}),
        ("schedule-none-without-warmup", "a constant rate where there is no warm-up",
         {"# settings": 'schedule = schedule if warmup else "constant"'}),
        ("schedule-below-0", "a negative η beyond the last step",
         {"# rate": "factor = (total - k) / (total - warmup) if k > total else factor"}),
    ],
    "optimizer.combined": [
        ("loraplus-constant", "B's rate without the schedule, with LoRA+",
         {"# parameter": 'rate = lr * ratio if "loraplus_lr_ratio" in settings and '
                         'name.endswith("B") else rate'}),
        ("schedule-constant-without-warmup", "no warm-up where the schedule is constant",
         {"# rate":
              'factor = 1.0 if schedule == "constant" else factor'}, "transformers get_scheduler"),
    ],
}
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(OPTIMIZER, "OPTIMIZER", ADAMW),
    *mutants(OPTIMIZER, "OPTIMIZER", SGD),
    *mutants(OPTIMIZER, "OPTIMIZER", CLIP),
    *mutants(OPTIMIZER, "OPTIMIZER", SCHEDULE),
    *mutants(OPTIMIZER, "OPTIMIZER", LORAPLUS),
    *mutants(OPTIMIZER, "OPTIMIZER", SIZES),
    *mutants(OPTIMIZER, "OPTIMIZER", ACCUMULATE),
    *mutants(OPTIMIZER, "OPTIMIZER", TOGETHER),
    *equivalents(OPTIMIZER, "optimizer", SAME),
)
