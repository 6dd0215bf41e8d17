"""From an archive of scans to a dataset directory, in steps that can be killed and run again."""
