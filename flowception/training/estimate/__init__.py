"""What a run will need before it starts: memory, communication, time, and what would stop it."""
