"""Rank discovery, check-in, preflight checks, supervision and shutdown on one or many hosts."""
