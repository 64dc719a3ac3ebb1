"""The algorithms of the papers. Pure: no torch, no DeepSpeed, no files, no environment, no clock."""
