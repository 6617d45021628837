"""The single-process trainer: data, loss, step, log, save."""
