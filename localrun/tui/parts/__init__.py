"""What the chat screen is made of besides widgets: parts that each own some state and the commands about it.

A part knows the widgets that it fills and the parts that it was given, never the screen that puts them together. What it
changes in the background (the store, an answer that ends) goes through the `WorkQueue`, one thing after the other.
"""
