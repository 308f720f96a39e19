"""The prompt format: messages to tokens, generated tokens to text and tool calls."""
