"""Llama and Qwen2 in files. Qwen2 is a Llama with biases at q, k and v."""

from dataclasses import replace

from minilora.io.architectures.architecture import NO_TOKENS, Architecture, Gguf
from minilora.io.architectures.rope import ROPE_FIXED, read_rope, write_rope
from minilora.spec.architectures import Llama3
from minilora.spec.models import Llama

LLAMA_GGUF = Gguf(
    {
        "kv_heads": "attention.head_count_kv",
        "eps": "attention.layer_norm_rms_epsilon",
        "theta": "rope.freq_base",
    }
)

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    config=Llama,
    others=(Llama3,),
    constant={"qkv_bias": False},
    prefix="model.",
    outer={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    blocks="model.layers",
    block={
        "norm1": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "norm2": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    keys={
        "vocab": "vocab_size",
        "d": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
    absent={
        "kv_heads": lambda known: known["heads"],
        "head_dim": lambda known: known["d"] // known["heads"],
        "eps": lambda known: 1e-6,
        "tied": lambda known: False,
    },
    fixed={
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1,),
        "rope_interleaved": (False,),
        "sliding_window": (None,),
        **ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings is_llama_config",
    written={"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, **NO_TOKENS},
    special=("rope_theta", "rope_parameters", "rope_scaling"),
    read_fields=read_rope,
    write_settings=write_rope,
    buffers=r"\.rotary_emb\.inv_freq$",
    heeds_weight_tying=True,
    gguf=LLAMA_GGUF,
    permuted=(".q", ".k"),
    mlx_prefix="model.",
)

QWEN2 = replace(
    LLAMA,
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    others=(),
    constant={"qkv_bias": True},
    # transformers would take 32 key/value heads, whatever the model: the file has to say it
    absent={key: value for key, value in LLAMA.absent.items() if key != "kv_heads"},
    fixed={
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
        **ROPE_FIXED,
    },
    inert="attention_dropout max_position_embeddings sliding_window max_window_layers",
    written={"hidden_act": "silu", "attention_dropout": 0.0, **NO_TOKENS},
    special=(*LLAMA.special, "layer_types"),
    writes_replication=False,  # PEFT 0.21 makes such a model, which fails in its forward
    permuted=(),
)
