"""The engine process: messages, both ends of the pipe, and what each command does."""
