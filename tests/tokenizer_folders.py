"""Tokenizer folders as models of each family have them, trained here on a few lines."""

import json

from extras import optional

tokenizers = optional("tokenizers")

from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

CORPUS = [
    "A small model reads 1234 lines, and then it reads them again.",
    "user and assistant, system: who writes the answer? It is written below.",
    "Naïve façade, straße, 東京, emoji 😀 and\ttabs\n\nand empty lines.",
    "### Instruction:\n### Input:\n### Response:\nSummary: the the the",
] * 5
TRICKY = [
    "",
    " ",
    "A small model",
    "  two blanks, 1234567 and a tab\t.",
    "line\n\n\nline \n",
    "東京 straße 😀\u200d🔥 e\u0301",
    "<s>special</s> <|im_end|> [SEP] <|endoftext|>",
    "unseen: ЖЩ ∑ \u0000 \ufeff",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""With the marks that let transformers say which tokens are the assistant's."""

INST = """
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ("user", "assistant") %}
        {{- raise_exception("Only user and assistant: " ~ message.role) }}
    {%- endif %}
    {%- if message.role == "user" %}
        {{- " [INST] " ~ message.content ~ " [/INST]" }}
        {%- continue %}
    {%- endif %}
    {{- " " ~ message.content ~ eos_token }}
{%- endfor %}
"""
"""Where the template itself writes the beginning, and nothing asks for an answer."""


def added(token):
    """A special token as older folders write it out."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": token, **flags}


def byte_level():
    """As GPT-2, and as SmolLM2 with its digits apart."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    t.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return t, names | {"chat_template": CHATML}


def sentence_piece():
    """As Llama: blanks as ▁, one put before the text, and a token that begins it."""
    t = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special[:3], show_progress=False),
    )
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    names = {"bos_token": "<s>", "eos_token": added("</s>"), "unk_token": "<unk>"}
    return t, names | {"chat_template": [{"name": "default", "template": INST}]}


def word_piece():
    """As BERT; its file cuts and pads, as that of a sentence encoder does."""
    t = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer()
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    t.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    t.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    t.enable_truncation(5)
    t.enable_padding(length=5)
    names = ("cls", "[CLS]"), ("sep", "[SEP]"), ("pad", "[PAD]"), ("unk", "[UNK]")
    return t, {f"{name}_token": text for name, text in names}


FAMILIES = {"byte level": byte_level, "sentence piece": sentence_piece, "word piece": word_piece}


def write(folder, family, **settings):
    """The family's folder, with settings more or others."""
    t, names = FAMILIES[family]()
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | names | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
