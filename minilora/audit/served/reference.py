"""What the oracle computes: the log-probabilities of the base, and of the base with the adapter.

They are those of `minilora.spec`. The adapter's strength is a number f: its scale s becomes f s.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from minilora.io.lazy_weights import Expanded, OnDemand
from minilora.io.loading import AdaptedModel
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Batch, logits
from minilora.spec.ops import Array, Back, cross_entropy
from minilora.spec.quantization import quantize
from minilora.training.checkpointing import prepared
from minilora.training.generate import Sampling, fitting, generate
from minilora.training.kernels import forward_kernels

BATCH_TOKENS = 512
"""So many tokens go through the model at once."""

COLUMNS = 256
"""The number of tokens whose logits are formed at once."""

COARSE = {32: "q4_0", 1: "nf4"}
"""The coarsest rounding that a right server may have: four bits, by what divides a row's length."""


@dataclass(frozen=True)
class Setting:
    """A model that a server may serve.

    ``factor``: the f of the adapter's scale f s, None for the base alone; ``coarse``: with the
    base's matrices rounded to four bits.
    """

    factor: float | None = None
    coarse: bool = False


BASE = Setting()


@dataclass(frozen=True, eq=False)
class Scored:
    """One sequence under one setting.

    ``logprobs``: log p(token | those before it), NaN for the first; ``best``: the most probable
    token after those before it, -1 for the first; ``margin``: its log-probability less the next's.

    Shapes: logprobs (t,), best (t,), margin (t,).
    """

    logprobs: Array
    best: Array
    margin: Array


class Oracle:
    """The base and, if ``model`` has one, the adapter. What has been scored is remembered."""

    def __init__(self, model: AdaptedModel) -> None:
        self.model, self.base = model, model.base
        self.has_adapter = bool(model.changed)
        self._known: dict[tuple[Setting, tuple[int, ...]], Scored] = {}
        self.passes = 0

    def score(self, sequences: Sequence[tuple[int, ...]], setting: Setting) -> list[Scored]:
        """Each sequence under the setting.

        Errors: those of `models.logits`.
        """
        fresh = [s for s in dict.fromkeys(sequences) if (setting, s) not in self._known]
        fresh.sort(key=len)
        while fresh:
            rows = max(1, BATCH_TOKENS // len(fresh[-1]))
            part, fresh = fresh[-rows:], fresh[:-rows]
            for sequence, scored in zip(part, self._scored(part, setting), strict=True):
                self._known[setting, sequence] = scored
        return [self._known[setting, sequence] for sequence in sequences]

    def weights(self, setting: Setting) -> tuple[Params, TrainableSpec]:
        """The parameters and the scales of a setting."""
        W: Params = self.base.weights
        if setting.coarse:
            W = self._coarse
        if setting.factor is None or not self.has_adapter:
            return W, TrainableSpec()
        tuning, f = self.model.tuning, setting.factor
        scale = tuning.scale if f == 1 else {at: f * s for at, s in tuning.scale.items()}
        tuning = replace(tuning, scale=scale, trained=frozenset(), dropout_scale={})
        return ChainMap(dict(self.model.changed), W), tuning  # type: ignore[arg-type]

    @cached_property
    def _coarse(self) -> Params:
        """The base's weights with the matrices rounded to `COARSE`, kept in four bits."""
        W, names = self.base.weights, [*self.base.config.linears(), "embed"]
        rounded = {f"{at}.weight": _rounded(W, f"{at}.weight") for at in names}
        return ChainMap(Expanded(rounded), W)  # type: ignore[arg-type]

    def _scored(
        self, sequences: Sequence[tuple[int, ...]], setting: Setting, own_kernels: bool = True
    ) -> list[Scored]:
        """The sequences as one batch, padded on the right, which no earlier token sees."""
        c, (W, tuning) = self.base.config, self.weights(setting)
        lengths = np.array([len(s) for s in sequences])
        real = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate([np.array(s, np.int64) for s in sequences])
        batch = Batch(ids, mask=real)
        following = np.full_like(ids, -1)
        following[:, :-1] = np.where(real[:, 1:], ids[:, 1:], -1)
        found = np.full((3, ids.size), np.nan)

        def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
            wanted = np.flatnonzero(following.ravel() >= 0)
            for start in range(0, len(wanted), COLUMNS):
                columns = wanted[start : start + COLUMNS]
                z, labels = project(x[:, columns], at, W, tuning)[0], following.ravel()[columns]
                for k, i in enumerate(columns):
                    found[:, i] = _found(z[:, [k]].astype(np.float64), labels[[k]])
            return x, lambda dx: None

        kernels = forward_kernels(c, head)
        if not own_kernels:
            kernels = replace(type(kernels)(), head=head)
        logits(batch, prepared(W, c, tuning), c, tuning, kernels)
        self.passes += 1
        rows = found.reshape(3, *ids.shape)
        return [_shifted(rows[:, k, : len(s)]) for k, s in enumerate(sequences)]

    def rounding(self, sequence: tuple[int, ...]) -> float:
        """By how much two right orders of summation differ: attention by blocks and as written."""
        setting = Setting(1.0) if self.has_adapter else BASE
        one = self._scored([sequence], setting)[0].logprobs[1:]
        other = self._scored([sequence], setting, own_kernels=False)[0].logprobs[1:]
        u = float(np.finfo(self.base.weights["norm.weight"].dtype).eps)
        return float(max(abs(one - other).max(), u * max(1.0, abs(one).max())))

    def drawn(self, count: int, length: int, start: Sequence[int], seed: int) -> list[list[int]]:
        """Texts that the models write themselves, at temperature 1: half of them by each.

        They begin with ``start``, or a token that is drawn. A token that ends a text is not in it.
        """
        rng = np.random.default_rng(seed)
        c, tokenizer, texts = self.base.config, self.base.tokenizer, list[list[int]]()
        settings = [Setting(1.0), BASE] if self.has_adapter else [BASE]
        for k, setting in enumerate(settings):
            rows = count // len(settings)
            first = rng.integers(0, min(c.vocab, tokenizer.vocab), (rows, 1)).tolist()
            prompts = [list(start) or one for one in first]
            W, tuning = self.weights(setting)
            steps = generate(
                prompts, W, c, tuning, max_new_tokens=fitting(c, len(prompts[0]), length),
                stop=tokenizer.stop_ids, sampling=Sampling(1.0), seed=seed + k,
            )  # fmt: skip
            for step in steps:
                for prompt, token in zip(prompts, step, strict=True):
                    if token is not None and token not in tokenizer.stop_ids:
                        prompt.append(token)
            texts += prompts
        return texts


def _found(z: Array, label: Array) -> tuple[Array, int, float]:
    """log p of the label, the most probable token, and the log of its odds against the second.

    Shapes: z (v, 1), label (1,).
    """
    second, first = np.partition(z[:, 0], -2)[-2:]
    return -cross_entropy(z, label, 1)[0], int(z.argmax()), first - second


def _shifted(rows: Array) -> Scored:
    """What was found at the token before, at the token itself."""
    shifted = np.concatenate([np.full((3, 1), np.nan), rows[:, :-1]], axis=1)
    best = np.where(np.isnan(shifted[1]), -1, shifted[1]).astype(np.int64)
    return Scored(shifted[0], best, shifted[2])


def _rounded(W: Params, name: str) -> OnDemand:
    matrix = np.asarray(W[name])
    fitting = [scheme for block, scheme in COARSE.items() if matrix.shape[1] % block == 0]
    return OnDemand(quantize(matrix, fitting[0]))
