"""LoRAs of requests: read from safetensors files, checked against a model, and passed to its graphs row by row."""
