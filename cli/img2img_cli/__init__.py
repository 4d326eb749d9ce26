"""The `img2img` command."""
