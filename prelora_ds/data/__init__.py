"""Images in WebDataset shards: written once, indexed by a manifest, read in an order independent of the world size."""
