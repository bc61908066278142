"""What each vector is good for: flags, and what a reader of a failure wants to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NOTES: dict[str, dict[str, Any]] = {
    "Exact": {
        "bugType": "ARITHMETIC",
        "description": "Small whole numbers, of which every order of operations gives the same "
        "bits: answers compare by ==.",
        "effect": "Whatever differs is no rounding.",
        "links": [],
    },
    "FullPrecision": {
        "bugType": "PRECISION",
        "description": "The inputs use all digits of the widest dtype they are put to.",
        "effect": "An intermediate result in a narrower dtype shows.",
        "links": [],
    },
    "Scale": {
        "bugType": "SCALE",
        "description": "The scale alpha / r is neither 1 nor alpha; it is the nearest float64.",
        "effect": "The adapter is learned at one strength and applied at another.",
        "links": ["https://arxiv.org/abs/2106.09685"],
    },
    "RsLoRA": {
        "bugType": "SCALE",
        "description": "The scale is alpha / sqrt(r), the nearest float64.",
        "effect": "With alpha / r the adapter is too weak by sqrt(r).",
        "links": ["https://arxiv.org/abs/2312.03732"],
    },
    "Square": {
        "bugType": "LAYOUT",
        "description": "The weight is square: a transpose does not fail by its shape.",
        "effect": "Another function, silently.",
        "links": [],
    },
    "StoredInOut": {
        "bugType": "LAYOUT",
        "description": "The module keeps its weight as (in, out), like GPT-2's; W is given as "
        "(out, in), and a merged weight is wanted so.",
        "effect": "A merge that adds B A without a transpose spoils the weight.",
        "links": [],
    },
    "OneToken": {
        "bugType": "SHAPE",
        "description": "x has no axis of tokens: x (n,) gives y (m,).",
        "effect": "A product along the wrong axis, or an axis too many.",
        "links": [],
    },
    "Batch": {
        "bugType": "SHAPE",
        "description": "x has two axes before its features; gradients sum over both.",
        "effect": "A gradient of the first sequence alone.",
        "links": [],
    },
    "RankOne": {
        "bugType": "SHAPE",
        "description": "r = 1.",
        "effect": "An axis that is lost, or broadcast.",
        "links": [],
    },
    "ZeroWeight": {
        "bugType": "ARITHMETIC",
        "description": "W = 0: the branch alone is seen.",
        "effect": "In half precision a base of the usual size drowns an error of the branch.",
        "links": [],
    },
    "Bias": {
        "bugType": "BIAS",
        "description": "The base has a bias; its gradient dbias is optional.",
        "effect": "A bias that is lost, scaled, or added twice.",
        "links": [],
    },
    "Dropout": {
        "bugType": "DROPOUT",
        "description": "The branch sees x * keep / (1 - p), the base sees x.",
        "effect": "Another mean, or a base that is dropped too.",
        "links": ["https://arxiv.org/abs/2106.09685"],
    },
    "Evaluation": {
        "bugType": "DROPOUT",
        "description": "A rate p without a mask, outside training, drops and rescales nothing.",
        "effect": "Outputs too large by 1 / (1 - p).",
        "links": [],
    },
    "Gradients": {
        "bugType": "GRADIENT",
        "description": "y, and the gradients of the sum of dy * y.",
        "effect": "Training goes elsewhere, and often still goes down.",
        "links": ["https://arxiv.org/abs/2106.09685"],
    },
    "DoRA": {
        "bugType": "VARIANT",
        "description": "The rows of W + s B A have the lengths of the magnitude.",
        "effect": "Norms of another axis or of W alone give another function after the first step.",
        "links": ["https://arxiv.org/abs/2402.09353"],
    },
    "DoraNorm": {
        "bugType": "CONVENTION",
        "description": "The norm is held constant in the gradients (out), or differentiated (alt).",
        "effect": "Both are right; a mixture is not.",
        "links": ["https://arxiv.org/abs/2402.09353"],
    },
    "LoraBias": {
        "bugType": "VARIANT",
        "description": "B has a trained bias, which is scaled with the branch.",
        "effect": "A bias that is not scaled, or that dropout acts on.",
        "links": [],
    },
    "Unequal": {
        "bugType": "SEVERAL",
        "description": "Adapters of unequal ranks and scales, one of them rsLoRA's.",
        "effect": "The scale of one adapter is applied to all.",
        "links": [],
    },
    "EqualRanks": {
        "bugType": "SEVERAL",
        "description": "Adapters of one rank, whose factors and scales differ.",
        "effect": "Factors are summed one by one, or one scale is applied to all.",
        "links": [],
    },
    "Weights": {
        "bugType": "SEVERAL",
        "description": "Weights of both signs, none of them 1.",
        "effect": "A weight that enters as its root or its square.",
        "links": [],
    },
    "Rows": {
        "bugType": "SEVERAL",
        "description": "Rows in no order, and -1 for rows without an adapter.",
        "effect": "A request is answered with another one's adapter; -1 taken for the last.",
        "links": [],
    },
    "AdamW": {
        "bugType": "OPTIMIZER",
        "description": "Decay apart from the gradient; both running means corrected; eps outside "
        "the root.",
        "effect": "Another rate or decay in the first steps, or in all.",
        "links": ["https://arxiv.org/abs/1711.05101"],
    },
    "SGD": {
        "bugType": "OPTIMIZER",
        "description": "Momentum without dampening, decay coupled into the gradient.",
        "effect": "Another decay, or a first step that is too small.",
        "links": [],
    },
    "Clip": {
        "bugType": "OPTIMIZER",
        "description": "One norm of all gradients together; half of the steps exceed the limit.",
        "effect": "Clipped one by one, the direction changes.",
        "links": [],
    },
    "Schedule": {
        "bugType": "OPTIMIZER",
        "description": "The rate of step k = 0, 1, ... is k / warmup at first.",
        "effect": "A schedule that is a step ahead or behind.",
        "links": [],
    },
    "LoRAPlus": {
        "bugType": "OPTIMIZER",
        "description": "The rate of each B is greater by the ratio.",
        "effect": "The rate of A, or of all.",
        "links": ["https://arxiv.org/abs/2402.12354"],
    },
    "Accumulation": {
        "bugType": "OPTIMIZER",
        "description": "Micro-batches with unequal numbers of labels that count; their gradients "
        "are means over their own.",
        "effect": "A mean of means is not the gradient of the batch.",
        "links": ["https://huggingface.co/blog/gradient_accumulation"],
    },
    "Initial": {
        "bugType": "STATE",
        "description": "The start of an adapter; what chance decides is not asked.",
        "effect": "A model that is not the base before its first step.",
        "links": ["https://arxiv.org/abs/2106.09685"],
    },
    "Layer": {
        "bugType": "LAYOUT",
        "description": "A layer of any kind, adapted, trained or merged.",
        "effect": "A stride, a group, a storage or a table that the adapter does not follow.",
        "links": [],
    },
    "States": {
        "bugType": "STATE",
        "description": "Adapters are added, activated, merged, scaled, saved, loaded and deleted.",
        "effect": "A change that is applied twice, or not, or that stays.",
        "links": [],
    },
    "Names": {
        "bugType": "NAMES",
        "description": "Which modules a configuration adapts, or which tensors are trained.",
        "effect": "A module that is left out, or adapted by a part of its name.",
        "links": [],
    },
    "Files": {
        "bugType": "FILES",
        "description": "A model and an adapter in folders of Hugging Face and PEFT.",
        "effect": "A scale, a pattern or a tensor that is lost between the file and the function.",
        "links": [],
    },
    "Training": {
        "bugType": "OPTIMIZER",
        "description": "Whole steps of training from files and batches.",
        "effect": "Another shift, mask, mean, clip, schedule or decay.",
        "links": [],
    },
    "Meaningless": {
        "bugType": "INVALID",
        "description": "A configuration that adapts nothing, or contradicts itself.",
        "effect": "A training that trains nothing, without a word.",
        "links": [],
    },
    "IndexBeyond": {
        "bugType": "INVALID",
        "description": "A row names an adapter beyond the last.",
        "effect": "Another one's weights, or memory that is nobody's.",
        "links": [],
    },
    "RanksDiffer": {
        "bugType": "INVALID",
        "description": "A has r rows, and B a single column.",
        "effect": "Broadcast, B acts on each row of A.",
        "links": [],
    },
}
"""What each flag says: the kind of mistake, what is special here, and what goes wrong."""


def flags(
    check: str, method: str, given: Mapping[str, Any], drawn: str, lane: str
) -> tuple[str, ...]:
    """The flags of a vector that is asked this."""
    if method == "module":
        given = {**given["layer"], **given["adapter"], **given}
    layer, several = "W" in given and "A" in given, "adapters" in given
    shape, rows = np.shape(given.get("W", 0)), np.ndim(given.get("x", [[]]))
    r, alpha = given.get("r", 0), given.get("alpha", 0)
    ranks, alphas = ({a[name] for a in given.get("adapters", ())} for name in ("r", "alpha"))
    has = {
        "Exact": lane == "exact",
        "FullPrecision": drawn != "bfloat16" and lane != "exact",
        "Scale": layer and not given.get("use_rslora") and alpha not in (r, r * alpha),
        "RsLoRA": bool(given.get("use_rslora")),
        "Square": layer and shape[0] == shape[1],
        "StoredInOut": bool(given.get("fan_in_fan_out")),
        "OneToken": rows == 1,
        "Batch": rows == 3,
        "RankOne": r == 1,
        "ZeroWeight": layer and not given["W"].any(),
        "Bias": "bias" in given,
        "Dropout": "keep" in given,
        "Evaluation": ".evaluation" in check,
        "Gradients": method == "lora_linear_vjp",
        "DoRA": bool(given.get("use_dora")),
        "DoraNorm": bool(given.get("use_dora")) and method == "lora_linear_vjp",
        "LoraBias": "lora_bias" in given,
        "Unequal": several and len(ranks) > 1,
        "EqualRanks": several and len(ranks) == 1 and len(alphas) > 1,
        "Weights": several and len(given.get("weights", [])) > 1,
        "Rows": "index" in given,
        "AdamW": given.get("optimizer") == "adamw",
        "SGD": given.get("optimizer") == "sgd",
        "Clip": "max_grad_norm" in given,
        "Schedule": "schedule" in given,
        "LoRAPlus": "loraplus_lr_ratio" in given,
        "Accumulation": any(isinstance(step, list) for step in given.get("gradients", [])),
        "Initial": method == "init",
        "Layer": method == "module",
        "States": method == "session",
        "Names": method in ("targets", "trainable"),
        "Files": "model_dir" in given,
        "Training": method == "train",
    }
    return tuple(flag for flag, here in has.items() if here)
