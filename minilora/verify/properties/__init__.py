"""The laws of LoRA over variants and kinds of layers."""
