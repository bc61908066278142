"""LyCORIS: its LoConModule around a linear layer."""

from typing import Any

import numpy as np
import torch
from lycoris.modules.locon import LoConModule

from minilora.verify.peers._torch import plain_number, to_torch
from minilora.verify.peers._torch_linear import Built, TorchLinear, column_or_row
from minilora.verify.peers.lycoris import PEER
from minilora.verify.peers.peer import refuse_settings


@PEER.describes
class Lycoris(TorchLinear):
    """Its forward rebuilds W + s B A; its dropout has no mask that could be given."""

    def build(
        self,
        W: np.ndarray,
        *,
        alpha: float,
        r: int,
        bias: bool = False,
        use_rslora: bool = False,
        use_dora: bool = False,
        **unknown: Any,
    ) -> Built:
        """The module, in the place of the linear layer's forward."""
        refuse_settings("LyCORIS", unknown)
        m, n = W.shape
        dtype = to_torch(W).dtype
        linear = torch.nn.Linear(n, m, bias=bias).to(dtype)
        adapter = LoConModule(
            "linear",
            linear,
            lora_dim=r,
            alpha=plain_number(alpha),
            rs_lora=use_rslora,
            weight_decompose=use_dora,
        ).to(dtype)
        adapter.apply_to()
        parameters = {
            "W": linear.weight,
            "A": adapter.lora_down.weight,
            "B": adapter.lora_up.weight,
        }
        layouts = {}
        if bias:
            parameters["bias"] = linear.bias
        if use_dora:
            parameters["magnitude"] = adapter.dora_scale
            layouts["magnitude"] = column_or_row

        def merge() -> torch.Tensor:
            adapter.merge_to()
            return linear.weight

        return Built(linear, parameters, merge, layouts)
