"""An export: its form, how far that form is from the live model, and every file of it."""

import math
from typing import Literal

from data_contracts.data_reports import Report

ExportFormat = Literal["adapter", "merged", "gguf"]
MergeBase = Literal["full", "dequantised"]
Dtype = Literal["fp32", "bf16", "fp16", "q8_0"]

BYTES_OF_A_WEIGHT: dict[Dtype, float] = {"fp32": 4, "bf16": 2, "fp16": 2, "q8_0": 34 / 32}


class Distance(Report):
    """A form compared with the live model on the same tokens: held-out answers, and text of no domain."""

    kl_nats: float  # mean over answer tokens of KL(live || form)
    nll_nats: float  # per answer token
    agreement: float  # share of answer tokens where both would write the same token
    general_nll_nats: float | None  # per token; None: the texts are not installed

    @property
    def general_perplexity(self) -> float | None:
        return None if self.general_nll_nats is None else math.exp(self.general_nll_nats)


class Survival(Report):
    """What rounding leaves of what was learned."""

    survival: float  # 1 - |stored - exact| / |learned|, norms over all tuned weights; below 0 the error is the larger
    unchanged: float  # share of the tuned weights that are stored as if nothing had been learned


class FormMeasured(Report):
    """A way to merge: which base the adapter is added to, and in which numbers the sum is stored."""

    base: MergeBase
    dtype: Dtype
    distance: Distance
    delta: Survival | None  # None: no adapter, the version is all weights
    bytes: int  # of the weights

    @property
    def label(self) -> str:
        return f"{self.base} base, {self.dtype}"


class Runtime(Report):
    """The file in llama.cpp itself, by token ids and by text."""

    name: str
    kl_nats: float  # over the likeliest tokens and the rest as one: a lower bound
    positions: int
    prompts: int
    same_tokens: int  # prompts that its own tokenizer reads as the live model's does


class Exported(Report):
    """What `export.json` says."""

    model: str
    format: ExportFormat
    base: str
    base_digest: str
    lineage_sha256: str | None  # None: the version was registered without a lineage
    adapter_sha256: str
    tolerance_nats: float
    items: int
    tokens: int  # of their answers
    live: Distance
    forms: list[FormMeasured]  # all that were measured; none for an adapter
    chosen: FormMeasured | None
    written: Distance  # of the files, read back by a process of its own
    runtime: Runtime | None  # None: not a GGUF, or llama.cpp is not installed
    notes: list[str]
    files: dict[str, str]  # name -> sha256
