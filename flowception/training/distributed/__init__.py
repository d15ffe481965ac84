"""Distributed training: launch, collectives, the DeepSpeed engine and its sharded state, and hang detection."""
