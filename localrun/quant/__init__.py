"""Checkpoints, number formats and the converter. Knows nothing about inference."""
