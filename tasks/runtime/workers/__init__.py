"""Child processes: the harness every worker runs in, its device, and the ranks that share one worker's work."""
