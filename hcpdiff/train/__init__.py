"""The training run: wiring, the loop, the optimizer, processes, hooks."""
