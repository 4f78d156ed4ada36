"""Tuning a model: configurations, batches, the loop, checkpoints."""
