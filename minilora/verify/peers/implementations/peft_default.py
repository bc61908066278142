"""PEFT as it is without further words: adapters of a half base are kept in float32."""

from __future__ import annotations

from minilora.verify.peers._peft import LinearLayer
from minilora.verify.peers.peft_default import PEER


@PEER.describes
class PeftDefault(LinearLayer):
    """``autocast_adapter_dtype=True``, also under torch's autocast."""

    autocast_adapters = True
