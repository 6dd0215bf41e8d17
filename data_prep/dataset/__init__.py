"""The dataset directory, the only contract between preparation and training: schema, reader,
writers, cache, views."""
