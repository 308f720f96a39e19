"""Experts on GPUs: slots, streaming, probes."""
