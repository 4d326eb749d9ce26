"""The parts of `scripts/soak`, which see, and the stand-in server that the chaos and fuzz tests share with it."""
