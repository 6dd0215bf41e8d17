"""Scans: files and their headers -> series -> volumes in Hounsfield units, or a reason why not."""
