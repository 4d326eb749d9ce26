"""The bundle: its manifest, the rules for files that somebody else wrote, and the limits that verification holds it to."""
