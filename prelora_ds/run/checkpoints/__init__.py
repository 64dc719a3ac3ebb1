"""Checkpoints: their content, and how they are written, voted on, retained and found."""
