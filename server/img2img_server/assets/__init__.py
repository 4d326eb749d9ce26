"""Assets: images that the server stores for its clients."""
