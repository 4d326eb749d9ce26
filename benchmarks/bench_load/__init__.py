"""`scripts/bench load`: the server against three peers, under load, in one run."""
