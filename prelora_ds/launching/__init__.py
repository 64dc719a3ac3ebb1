"""Which rank a process is, and how a process ends."""
