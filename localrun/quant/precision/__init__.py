"""Chooses the precision of each expert: importance, measured error, solver, report."""
