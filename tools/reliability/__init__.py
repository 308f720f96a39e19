"""The reliability campaign: damaged files, read faults, killed writers, full drives and little memory, beyond any test suite.

    python -m tools.reliability mutate|faults|kills|full|chat --help

Every part prints its seed, writes what it has done to a file and goes on from there when it is started again; exit code 1 with
problems. docs/reliability.md has the figures.
"""
