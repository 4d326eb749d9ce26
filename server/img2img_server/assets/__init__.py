"""Assets: pictures that are kept for clients."""
