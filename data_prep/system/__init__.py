"""The ground that both packages stand on: errors, files, object stores, worker processes and the
runner of commands."""
