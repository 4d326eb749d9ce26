"""`img2img bench-model`: times the parts of a bundle on this machine."""
