"""Read and write a HuggingFace model folder: facts, files, tensors, and the mapping to Megatron."""
