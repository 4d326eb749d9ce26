"""Publishes a verified bundle atomically."""
