"""The engine process: messages, both ends of the pipe, and the implementation of each command."""
