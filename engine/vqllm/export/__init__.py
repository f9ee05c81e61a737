"""Checkpoints to graphs for other runtimes."""
