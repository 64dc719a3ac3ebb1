"""Checkpoints: what is in one, how it is written, voted on, kept, found again, and who may write to a folder."""
