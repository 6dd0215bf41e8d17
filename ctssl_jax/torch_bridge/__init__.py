"""Weights between this package and PyTorch: names of tensors, twins of the models, weight files."""
