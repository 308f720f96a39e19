"""Simulates expert caches and machines: policies, traces, replays."""
