"""What every subject stands on: `store.Store`, `processes.run_worker`, `partitions`, `fingerprint`."""
