"""Speed: the two sides that are timed, and where the time of a step goes."""
