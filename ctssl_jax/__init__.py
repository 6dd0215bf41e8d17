"""Self-supervised pretraining for chest CT in JAX and Flax: data loading, models, training, evaluation."""
