"""Export models and checkpoints to formats of other libraries."""
