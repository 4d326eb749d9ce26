"""What the outside is told of the server."""
