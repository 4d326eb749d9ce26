"""Models: the store, models in memory, downloads, and promotion to better engines."""
