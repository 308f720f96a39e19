"""Official checkpoints: config, safetensors, tokenizer, and how their tensors map to GGUF."""
