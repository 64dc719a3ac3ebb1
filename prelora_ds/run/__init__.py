"""One run and its folder: how it records, saves, decides and recovers."""
