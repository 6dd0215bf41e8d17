"""Run directories: the `Run` handle, checkpoints, their checksums, reports and pictures."""
