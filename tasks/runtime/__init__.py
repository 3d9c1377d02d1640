"""What every subject uses: `store.Store`, `processes.run_worker`, `partitions`, `fingerprint`."""
