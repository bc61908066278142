"""A right training loop: the specification's loss under the reference's optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapter_names, read_adapter, read_lora_config
from minilora.spec.initialization import draw_dropout, input_shapes
from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config, loss, shifted_labels
from minilora.spec.ops import IGNORED
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.optimizer import Optimizer


class Training(Optimizer):
    def train(
        self, model_dir: str, adapter_dir: str, batches: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The adapter after each step, by the names in its file."""
        # start
        settings = {"total_steps": len(batches), **settings}
        c, W = read_model(model_dir)
        factors, spec = read_adapter(adapter_dir, c, base=W)
        self.dropout = read_lora_config(adapter_dir, c).lora_dropout
        self.rng = np.random.default_rng(1)
        self.checkpointing = settings.get("gradient_checkpointing", False)
        # trained
        W = W | factors
        start = {name: W[name] for name in sorted(spec.trained)}
        now, gradients, history = start, [], []
        for step in batches:
            # batches of the step
            batches_of_step = [self.batch(arrays) for arrays in step]
            labelled = [b for b in batches_of_step if (shifted_labels(b, c) != IGNORED).any()]
            parts = [self.part(W | now, batch, c, spec) for batch in labelled]
            # accumulate
            gradients.append(parts)
            now = self.optimizer_steps(start, gradients, settings)[-1]
            history.append(now)
        names = adapter_names(c, sorted(spec.trained))
        vectors = {name for name, array in start.items() if array.shape[1] == 1}
        answer = [{names[n]: v[:, 0] if n in vectors else v for n, v in p.items()} for p in history]
        # answer
        return answer

    def batch(self, arrays: Mapping[str, Array]) -> Batch:
        """A batch of the contract."""
        # arrays of the batch
        ids, labels, mask = arrays["input_ids"], arrays["labels"], arrays["attention_mask"]
        types, text = arrays.get("token_type_ids"), labels.ndim > 1
        # labels
        return Batch(ids, labels, mask.astype(bool), types=types)

    def part(self, W: Weights, batch: Batch, c: Config, spec: TrainableSpec) -> tuple[Any, Weights]:
        """The number of labels of a micro-batch and the gradient of their mean."""
        n = int((shifted_labels(batch, c) != IGNORED).sum())
        # part
        if self.dropout:
            shapes = {
                at: n for at, n in input_shapes(c, *batch.ids.shape).items() if at in spec.scale
            }
            dtype = next(iter(W.values())).dtype
            keep = draw_dropout(self.rng, self.dropout, shapes, dtype)
            spec = replace(spec, dropout_scale=keep)
        _, back = loss(batch, W, c, spec)
        g = back(1.0)
        # back
        return n, g
