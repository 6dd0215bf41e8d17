"""A task is a row of data: model, corruption, loss and scores of each strategy and downstream
application."""
