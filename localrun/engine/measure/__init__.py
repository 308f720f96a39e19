"""Measurements of a loaded model: speed, quality, expert use."""
