"""OpenAI's image API over HTTP, by the same services as img2img.v1. Imported only if `http_port` is set."""
