"""Networks as Flax modules: the vector-quantized autoencoder, the classifier, the U-Nets and
SE-ResNeXt.
"""
