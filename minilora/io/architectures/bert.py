"""BERT with a classification head in files, and the names of its classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.io.architectures.architecture import NO_TOKENS, Architecture
from minilora.io.errors import FormatError
from minilora.spec.models import Bert


def _read_fields(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The number of classes, which is 2 where the file says nothing."""
    labels, count = settings.get("id2label"), settings.get("num_labels")
    classes = 2 if count is None else count
    if labels is not None:
        classes = len(labels) if isinstance(labels, dict) else None
    if type(classes) is not int or classes < 2 or count not in (None, classes):
        remedy = "one class is regression, which is not implemented here"
        found = f"id2label {labels}, num_labels {count}"
        raise FormatError(path, "id2label", found, "2 classes or more", remedy)
    return {"classes": classes}


BERT = Architecture(
    name="BertForSequenceClassification",
    model_type="bert",
    config=Bert,
    headless="BertModel",
    prefix="bert.",
    outer={
        "embed": "bert.embeddings.word_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "types": "bert.embeddings.token_type_embeddings",
        "norm": "bert.embeddings.LayerNorm",
        "pooler": "bert.pooler.dense",
        "head": "classifier",
    },
    blocks="bert.encoder.layer",
    block={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    },
    keys={
        "vocab": "vocab_size",
        "d": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
        "eps": "layer_norm_eps",
    },
    absent={"eps": lambda known: 1e-12},
    fixed={"hidden_act": ("gelu",), "position_embedding_type": ("absolute",)},
    inert="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout "
    "tie_word_embeddings directionality pooler_fc_size pooler_num_attention_heads "
    "pooler_num_fc_layers pooler_size_per_head pooler_type",
    written={
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **NO_TOKENS,
    },
    special=("id2label", "num_labels"),
    read_fields=_read_fields,
    buffers=r"(^|\.)embeddings\.position_ids$",
)
