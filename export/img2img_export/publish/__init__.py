"""How a verified bundle comes into place."""
