"""What serves behind the gRPC front: an engine in this process, or replicas on Ray."""
