"""The reliability campaign: damaged files, kills, read faults, full drives and little memory, at numbers that no test suite has time for.

    python -m tools.reliability mutate|kill|faults|disk|chat --help

Every part prints its seed, writes what it has done to a file and goes on from there when it is started again; exit code 1 with
problems. docs/reliability.md has the figures.
"""
