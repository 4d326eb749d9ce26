"""Engines that run elsewhere, as Ray Serve deployments: what a front sees of them, and what each of them is."""
