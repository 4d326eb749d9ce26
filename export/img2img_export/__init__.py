"""Model -> bundle: turns a diffusers model into a verified bundle that the server serves."""
