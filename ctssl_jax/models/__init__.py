"""Flax modules and nothing else: the vector-quantized autoencoder, classifiers, U-Nets,
SE-ResNeXt."""
