"""Estimates before a run starts: memory, communication, step time, and problems that would stop it."""
