"""Replicas of the engine as a Ray Serve deployment, and the front that sends requests to them."""
