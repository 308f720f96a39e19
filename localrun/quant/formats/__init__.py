"""Number formats: from a checkpoint's to ggml's, and quantizers."""
