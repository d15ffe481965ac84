"""The training job: DeepSpeed engine, optimizer schedule, EMA, checkpoints, metrics, validation and the loop."""
