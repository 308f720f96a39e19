"""Trains the demo model that ships in `localrun/demo/`: sources, corpus, tokenizer, model, training, export, evaluation.

`python -m tools.demo_model all` goes from package names and checksums to the final checkpoint. Only this package needs
PyTorch; nothing in `localrun` imports it.
"""
