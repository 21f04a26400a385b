"""Training: one straight loop, its state, and the folder that a run leaves."""
