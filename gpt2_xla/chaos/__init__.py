"""Hurt a training run at random moments, start it again, and compare it with one that nobody hurt: scripts/chaos.py."""
