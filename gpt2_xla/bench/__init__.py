"""Timing the training step: our loop and bare ones, in turns, each where it runs alone; see scripts/bench.py."""
