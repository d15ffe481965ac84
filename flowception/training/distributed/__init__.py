"""Many processes as one job: launch, collectives, DeepSpeed's engine and its state, and ranks that hang."""
