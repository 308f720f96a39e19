"""Which expert gets which precision: importance, measured error, solver, report."""
