"""Where source images come from."""
