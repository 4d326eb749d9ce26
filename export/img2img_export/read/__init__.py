"""From what a person names to the files of a checkpoint, checked before they are read."""
