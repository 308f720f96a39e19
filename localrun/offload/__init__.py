"""Experts: our ggml device, stores, slots and kernels. Knows files and llama.cpp, nothing about chats."""
