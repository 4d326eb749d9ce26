"""Three servers that a careful user would write around diffusers' own pipelines: what `scripts/bench load` compares with."""
