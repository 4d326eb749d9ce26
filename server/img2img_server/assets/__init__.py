"""Assets: images that are kept for clients."""
