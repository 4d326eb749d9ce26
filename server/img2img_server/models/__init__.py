"""Which models there are, in memory and to come."""
