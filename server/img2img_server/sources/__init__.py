"""Reading and fetching source images."""
