"""The settings of a run: read, checked, and compared with those of another run."""
