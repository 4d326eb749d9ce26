"""Finds the files of a checkpoint and checks them before they are read."""
