"""Official checkpoints: config, safetensors, tokenizer, and the mapping of their tensors to GGUF."""
