"""The parts of the chat screen besides widgets; each owns some state and the related commands.

A part knows the widgets it fills and the parts it was given, but not the screen. Background changes (the store, an answer that
ends) go through the `WorkQueue`, one at a time.
"""
