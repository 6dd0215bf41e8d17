"""Dataset directory -> batches: neighbouring slices, labels, the deterministic order of a
training."""
