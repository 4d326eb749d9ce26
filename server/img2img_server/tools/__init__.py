"""Commands beside `img2img serve`: bench-model, top, the demo model."""
