"""The only binding to ggml and llama.cpp's C API: library, structures, types, devices, log. Knows nothing about models."""
