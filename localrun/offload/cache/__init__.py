"""Experts in RAM: slots, reads from the drive, routing profile, counters."""
