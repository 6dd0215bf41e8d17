"""One raw scan -> a prepared volume, without a dataset."""
