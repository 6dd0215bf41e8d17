"""Measures and confidence intervals of results: numpy and scikit-learn."""
