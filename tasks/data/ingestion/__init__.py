"""Every record of every source becomes a row of a snapshot: `ingest.ingest_sources`, `readers`, `sources`."""
