"""The algorithms of the papers, as pure code: it uses no torch, DeepSpeed, files, environment or clock."""
