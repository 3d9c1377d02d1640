"""The job and the report of the worker that compares two adapters."""

from data_contracts.data_reports import Report
from data_contracts.jobs import Job


class CompareAdaptersJob(Job):
    """Measure the distance of two folders of safetensors."""

    then: str
    now: str


class AdaptersReport(Report):
    """distance: the largest |now - then| / |then| of a tensor; infinite if their tensors have other names or shapes."""

    distance: float
