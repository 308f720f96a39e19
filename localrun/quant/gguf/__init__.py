"""GGUF files: headers, checks, and models stored in them."""
