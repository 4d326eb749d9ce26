"""The bundle: its manifest, the limits of its verification, and checks of untrusted files."""
