"""Our ggml device: graph operations from llama.cpp to the expert pool."""
