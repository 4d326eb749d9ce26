"""Commands other than `img2img serve`: bench-model, top, and the demo model."""
