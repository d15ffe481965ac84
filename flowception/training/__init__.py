"""Training: DeepSpeed engine, optimizer, EMA, checkpoints, metrics, validation, and the training loop."""
