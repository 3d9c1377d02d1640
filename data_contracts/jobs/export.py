"""Jobs and reports of the export's workers: measure and write forms, read files back, convert to GGUF, ask llama.cpp."""

from data_contracts.data_reports import Report
from data_contracts.exports import Distance, Dtype, ExportFormat, FormMeasured, MergeBase, Runtime
from data_contracts.jobs import Job
from data_contracts.jobs.evaluation import AdaptedModel

TEXTS_FILE, LIVE_FILE = "texts.json", "live.npy"
"""What export_model leaves for the other workers: the held-out texts, and the live model's log-probabilities [N, V]."""

ChatMessages = list[dict[str, str]]


class LiveModelJob(Job):
    """A job that loads the live model: the version as it was trained and evaluated."""

    base: str  # folder
    model: AdaptedModel
    threads: int | None


class ExportJob(LiveModelJob):
    """Merge a version in every form, measure each against the live model, write the nearest one.

    The forms are the product of `bases` and `dtypes`; none only measures the live model.
    """

    test: str  # JSONL file of the held-out rows
    max_items: int
    max_tokens: int  # of an item or a passage
    max_passages: int  # texts of no domain
    bases: list[MergeBase]
    dtypes: list[Dtype]
    is_gguf: bool  # written in fp32: the converter rounds
    tolerance_nats: float


class FormsReport(Report):
    """Every form measured. forms: none for an adapter, which is exported as it is."""

    live: Distance
    forms: list[FormMeasured]
    chosen: FormMeasured | None  # None: none is near enough
    items: int
    tokens: int  # of their answers
    conversations: list[str]  # how the chat template writes a question and a conversation


class TokenSequence(Report):
    """Token ids; those from `start` on are scored."""

    ids: list[int]
    start: int


class HeldOutTexts(Report):
    """The texts on which every form is compared with the live model."""

    rows: list[TokenSequence]
    places: list[int]  # of each row's first answer token among those of the live model's log-probabilities
    passages: list[TokenSequence]
    prompts: list[tuple[str, list[int]]]  # of the rows, as text and as token ids


class CheckExportJob(LiveModelJob):
    """Measure the files of an export against the live model."""

    format: ExportFormat
    folder: str  # the export's
    file: str | None  # of a GGUF
    work: str  # folder with TEXTS_FILE and LIVE_FILE


class CheckExportReport(Report):
    distance: Distance


class ConvertJob(Job):
    """Convert a folder of weights to one GGUF."""

    converter: str  # path of convert_hf_to_gguf.py
    folder: str
    file: str
    dtype: Dtype
    name: str  # of the model, in the file


class LlamaCppJob(Job):
    """Run a GGUF in llama.cpp and compare it with the live model."""

    file: str
    work: str  # folder with TEXTS_FILE and LIVE_FILE
    positions: int  # most answer tokens to compare
    messages: list[ChatMessages]  # to be written by the chat template in the file


class LlamaCppReport(Report):
    runtime: Runtime
    conversations: list[str]
