"""scripts/run_hlo.py: the training step as a program of its own, run by jax's PJRT client."""
