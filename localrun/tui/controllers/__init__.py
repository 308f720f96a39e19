"""The controllers of the chat screen; each owns some state and the related commands.

A controller knows the widgets it fills and the controllers it was given, but not the screen. Background changes (the store, an
answer that ends) go through the `WorkQueue`, one at a time.
"""
