"""Where latents lie: what a clip is, how shard sets are written, found, read and verified, here or elsewhere."""
