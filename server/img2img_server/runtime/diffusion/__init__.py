"""Model families that the engine runs step by step."""
