"""Tasks, each a row of data: model, corruption, loss and scores."""
