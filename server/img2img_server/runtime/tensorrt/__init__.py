"""TensorRT engines: built in a process of their own, cached, and offered as candidates for promotion."""
