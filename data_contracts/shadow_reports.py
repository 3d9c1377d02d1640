"""What is kept of a question that champion and challenger have both answered, and what all of them say together."""

from data_contracts.data_reports import Report
from data_contracts.verdict import Estimate


class Given(Report):
    """An answer. tokens: the stop token too; seconds: of writing, not of waiting; stopped: ended by itself."""

    version: str
    answer: str
    tokens: int
    seconds: float
    stopped: bool


class Pair(Report):
    """A line of the shadow's file; texts are masked."""

    unix_seconds: float
    messages: list[dict[str, str]]
    champion: Given
    challenger: Given


class Side(Report):
    version: str
    tokens: float  # mean
    ms_per_token: float  # median over answers
    stopped: Estimate


class Difference(Report):
    """A question that both answer differently."""

    question: str
    champion: str
    challenger: str
    rouge_l: float


class ShadowReport(Report):
    """One pair of versions. same: share of answers alike but for white space; rouge_l: mean nearness, 1 is alike."""

    prompts: int
    since_unix_seconds: float
    until_unix_seconds: float
    champion: Side
    challenger: Side
    same: Estimate
    rouge_l: float
    most_different: list[Difference]
    other_pairs: int  # of versions that were compared before
