"""Image prompts of requests: IP-Adapters read from safetensors files, and the states that the control graph takes of them."""
