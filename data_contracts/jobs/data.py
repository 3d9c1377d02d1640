"""What the ingest step asks of its worker."""

from data_contracts.jobs import Job


class PythonDocsJob(Job):
    """Build instruction rows from docstrings; every field is the setting of `DataSpec` of the same name."""

    packages: list[str]
    max_lookup_rows: int | None
    max_summary_rows: int | None
    max_rows_per_package: int
