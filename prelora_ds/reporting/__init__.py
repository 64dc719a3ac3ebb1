"""What a run shows: progress, the final table, the exported model."""
