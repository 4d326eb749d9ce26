"""The commands `img2img export` and `img2img inspect`, and their output."""
