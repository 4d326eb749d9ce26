"""`scripts/bench load`: the server compared with three peers under load."""
