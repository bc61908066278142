"""Containers whose tensors have other names or are quantized."""
