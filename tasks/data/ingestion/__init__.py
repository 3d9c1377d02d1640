"""Every record of every source becomes a row of a snapshot: `ingest.ingest`, `readers`, `sources`."""
