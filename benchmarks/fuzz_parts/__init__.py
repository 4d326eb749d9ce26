"""The parts of `scripts/fuzz`, which see; the fuzz tests use the same server, seeds and rules."""
