"""Batches of a dataset: neighbouring slices, labels, and the deterministic order of a training."""
