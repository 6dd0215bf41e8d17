"""Pseudonyms, and the search of a dataset for what must not be in it."""
