"""What the workers of `tasks/models` get: a base to prepare, and the step-0 adapter to make on it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from data_contracts.jobs import Job
from data_contracts.train_spec import QuantType


class PrepareBaseJob(Job):
    base: str  # builtin:NAME, a folder, or a hub id
    revision: str | None  # of a hub id; None: the newest


class PreparedBase(BaseModel):
    """Report of that worker. path: where the files are; the other fields are those of a BaseModelRef."""

    model_config = ConfigDict(frozen=True)

    path: Path
    note: str
    revision: str | None
    licence: str
    stops: list[str]
    chat_template: str | None


class _Start(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int


class _LoraShape(_Start):
    """The settings of a TrainSpec with the same names."""

    kind: Literal["lora"] = "lora"
    rank: int
    alpha: int
    dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool


class LoraStart(_LoraShape):
    """A LoRA adapter made from the base in full precision, or from nothing but the seed."""

    init: Literal["default", "pissa", "olora"]


class LoftqStart(_LoraShape):
    """A LoRA adapter that makes up for what quantisation lost, so it depends on how the base is quantised."""

    init: Literal["loftq"]
    quant_type: QuantType
    double_quant: bool
    precision: str  # auto, fp32 or bf16: of the arithmetic


class PrefixStart(_Start):
    """Keys and values of virtual tokens in every layer."""

    kind: Literal["prefix"] = "prefix"
    prefix_tokens: int


StartSettings = LoraStart | LoftqStart | PrefixStart
"""What a step-0 adapter is made from."""


class InitAdapterJob(Job):
    base: Path
    settings: StartSettings
