"""transformers' own reader of PEFT's adapters, load_adapter, without PEFT's model around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minilora.verify.peers._transformers import load_base, logits_of
from minilora.verify.peers.transformers import PEER


@PEER.describes
class Transformers:
    """Each call opens both folders anew."""

    def logits(
        self, model_dir: str | Path, adapter_dir: str | Path, input_ids: np.ndarray
    ) -> np.ndarray:
        """The logits of the model after load_adapter."""
        model = load_base(model_dir)
        # Without it the library asks the hub for a revision, of a local folder too.
        model.load_adapter(str(adapter_dir), adapter_kwargs={"local_files_only": True})
        return logits_of(model, input_ids)
