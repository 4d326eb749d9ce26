"""Three servers around diffusers' pipelines, as a careful user would write them: the peers of `scripts/bench load`."""
