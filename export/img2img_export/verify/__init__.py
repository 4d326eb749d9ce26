"""Compares graphs and images with those of diffusers."""
