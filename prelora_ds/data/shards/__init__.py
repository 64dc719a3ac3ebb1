"""Writing, indexing and checking shards."""
