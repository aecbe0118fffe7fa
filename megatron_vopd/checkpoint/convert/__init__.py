"""Conversion between HuggingFace folders and Megatron checkpoints, and its check."""
