"""The one binding to ggml and llama.cpp's C side: library, structures, types, devices, log. Knows nothing of models."""
