"""Dialogs. Each returns its result to its caller; none changes the conversation itself."""
