"""Raw rows become splits: `ingestion.ingest`, `validation.validate`, `curation.curate`; is there new data: `freshness`."""
