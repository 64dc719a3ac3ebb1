"""Images in WebDataset shards.

The shards are written once, indexed by a manifest, and read in an order that does not depend on the
world size.
"""
