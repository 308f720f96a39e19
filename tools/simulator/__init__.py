"""What a cache of experts would hit, and what a machine would make of it: policies, traces, replays."""
