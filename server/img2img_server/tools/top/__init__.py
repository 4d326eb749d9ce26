"""`img2img top`."""
