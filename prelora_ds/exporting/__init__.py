"""A checkpoint as others open it."""
