"""One run and its folder: what it records, saves, decides and recovers from."""
