"""Pure functions of images, masks and embeddings in JAX, usable inside jit."""
