"""Small modules that everything may use: the call that is answered, cancellation, threads, child processes, directories."""
