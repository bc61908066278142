"""GPT-2 in files: one projection for q, k and v, and weights that lie (in, out)."""

from minilora.io.architectures.architecture import NO_TOKENS, Architecture, Gguf
from minilora.spec.models import GPT2

GPT_2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    config=GPT2,
    prefix="transformer.",
    outer={
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    blocks="transformer.h",
    block={
        "norm1": "ln_1",
        "qkv": "attn.c_attn",
        "o": "attn.c_proj",
        "norm2": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    keys={
        "vocab": "vocab_size",
        "d": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "ffn": "n_inner",
        "positions": "n_positions",
        "eps": "layer_norm_epsilon",
    },
    absent={"ffn": lambda known: 4 * known["d"], "eps": lambda known: 1e-5},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "tie_word_embeddings": (True,),
    },
    inert="attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj",
    written={
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **NO_TOKENS,
    },
    buffers=r"(^|\.)h\.\d+\.attn\.(masked_)?bias$",
    transposed=True,
    reads_replication=False,  # PEFT finds no layers there
    writes_replication=False,
    gguf=Gguf({"positions": "context_length", "eps": "attention.layer_norm_epsilon"}),
    mlx_prefix="model.",
)
