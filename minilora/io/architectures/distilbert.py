"""DistilBERT with a classification head in files."""

from dataclasses import replace

from minilora.io.architectures.architecture import NO_TOKENS
from minilora.io.architectures.bert import BERT
from minilora.spec.architectures import DistilBert

DISTILBERT = replace(
    BERT,
    name="DistilBertForSequenceClassification",
    model_type="distilbert",
    config=DistilBert,
    headless="DistilBertModel",
    prefix="distilbert.",
    outer={
        "embed": "distilbert.embeddings.word_embeddings",
        "positions": "distilbert.embeddings.position_embeddings",
        "norm": "distilbert.embeddings.LayerNorm",
        "pooler": "pre_classifier",
        "head": "classifier",
    },
    blocks="distilbert.transformer.layer",
    block={
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "norm1": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm2": "output_layer_norm",
    },
    keys={
        "vocab": "vocab_size",
        "d": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "ffn": "hidden_dim",
        "positions": "max_position_embeddings",
    },
    absent={},
    fixed={"activation": ("gelu",), "sinusoidal_pos_embds": (False,)},
    inert="dropout attention_dropout qa_dropout seq_classif_dropout "
    "tie_word_embeddings output_past tie_weights_",
    written={
        "activation": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
        **NO_TOKENS,
    },
)
