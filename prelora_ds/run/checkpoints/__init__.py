"""Checkpoints: what is in one, how it is written, voted on, kept and found again."""
