"""Training: data sets, optimizers, and the loop that yields checkpoints and writes nothing."""
