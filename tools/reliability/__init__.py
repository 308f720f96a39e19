"""The reliability campaign: damaged files, kills, read faults, full drives and little memory, in numbers beyond any test suite.

    python -m tools.reliability mutate|kill|faults|disk|chat --help

Every part prints its seed, writes what it has done to a file and goes on from there when it is started again; exit code 1 with
problems. docs/reliability.md has the figures.
"""
