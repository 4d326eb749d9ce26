"""TensorRT engines: built in a child process, cached on disk, and offered as candidates for promotion."""
