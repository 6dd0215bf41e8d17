"""Pseudonyms, and the search of a dataset for identifying values."""
