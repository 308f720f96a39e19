"""Dialogs. Each returns its result to whoever pushed it; none changes the conversation itself."""
