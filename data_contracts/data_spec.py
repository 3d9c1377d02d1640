"""The settings of the data stages: where rows come from, what is promised of them, how they are split."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_contracts.rows import LEAKS, UNREADABLE, Action, Reason

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion"]


# YAML has no enums, and a spec is read strictly: a reason comes as its name.
_Named = Annotated[Reason, BeforeValidator(Reason)]


# user:password@ (a port is none), token@ of a web address, or a query such as ?sig=, ?X-Amz-Signature= or &access_token=.
_SECRET = re.compile(
    r"://[^/@:]*:(?!\d+(/|$))[^@]*@|^https?://[^/@]+@|[?&][^=&]*(sig|token|key|secret|pass|pwd|credential|auth)[^=&]*=",
    re.IGNORECASE,
)


def holds_secret(address: str) -> bool:
    """Whether an address comes with what should be in the environment: a spec is shown in Prefect and MLflow."""
    return _SECRET.search(address) is not None


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class DataSpec(Section):
    source: list[str] = ["builtin:python-docs"]
    """Where raw rows come from: files, globs, folders, on this machine or at a URL (s3://, https:// and more, see docs/data.md);
    `hub:ORG/NAME` or `hub:ORG/NAME@REVISION`; or `builtin:python-docs`."""
    format: Format = "auto"
    """Row format; `auto` finds it from the first rows of each file."""
    columns: dict[str, str] = {}
    """Your column names for `prompt`, `completion` and optionally `system`; dots reach into nested values."""
    slice_field: str | None = None
    """A field of your rows whose values are slices of their own in the verdict, such as a product or a customer's tier; dots
    reach into nested values. Its values stand in reports and MLflow: name no field that holds personal data."""
    cluster_field: str | None = None
    """A field of your rows that says which of them belong together, such as a patient, a manual or a ticket; dots reach into
    nested values. Rows with the same value fall into one split and count as one in the statistics; only its hash is kept."""
    system_prompt: str | None = None
    """System message for rows that have none; null leaves that to the model's chat template."""
    encoding: str = "auto"
    """Text encoding of the source files (any Python codec name); `auto` finds out, see docs/data.md."""
    delimiter: Annotated[str, Field(pattern=r"^(auto|.)$")] = "auto"
    """Column separator of CSV files; `auto` finds comma, semicolon, tab or bar (.tsv files always use a tab)."""
    engine: Literal["local", "ray"] = "local"
    """What works on the parts of the data: this machine's cores, or a Ray cluster that sees the store (`[ray]`)."""
    licence: str | None = None
    """Licence of the rows, an SPDX id such as CC-BY-4.0 or words; null: known for built-in data, else "unknown". It is kept in
    the version's lineage, card and SBOM."""
    hub_split: str = "train"
    """Split to read from a hub data set."""
    packages: list[str] = ["stdlib"]
    """python-docs only: `stdlib`, or names of importable packages and modules."""
    max_lookup_rows: Annotated[int, Field(ge=0)] | None = None
    """python-docs only: most look-up rows (`what does X do?`); null takes all."""
    max_summary_rows: Annotated[int, Field(ge=0)] | None = None
    """python-docs only: most summary rows (source -> docstring), shortest sources first; null takes all."""
    max_rows_per_package: Annotated[int, Field(ge=1)] = 400
    """python-docs only: most rows of each kind from one top-level package, so that none dominates."""

    @model_validator(mode="after")
    def _no_source_holds_a_secret(self) -> "DataSpec":
        # The entry is not repeated here.
        wrong = [number for number, entry in enumerate(self.source, start=1) if holds_secret(entry)]
        if wrong:
            entries = ", ".join(map(str, wrong))
            raise ValueError(f"source: entry {entries} holds a password, key or signature; put it in the environment")
        return self


class ContractSpec(Section):
    max_quarantine_rate: Fraction = 0.05
    """Budget of rejected rows, as a share of all rows read; above it the run stops."""
    min_rows: Annotated[int, Field(ge=1)] = 20
    """Fewest rows that must be left after the row rules."""
    max_chars: Annotated[int, Field(ge=1)] = 8000
    """Longest row, all messages together, in characters; longer rows are quarantined. Raise it where
    `train.too_long` shall truncate or split them."""
    max_duplicate_rate: Fraction = 0.5
    """Largest share of exact copies among the rows that passed the rules; above it the run stops."""
    max_length_drift: Fraction = 0.3
    """Kolmogorov-Smirnov distance of prompt or answer lengths to the batch before; above it a warning."""
    max_share_drift: Annotated[float, Field(ge=0.0)] = 0.5
    """Kullback-Leibler divergence (nats) of the shares of sources or languages to the batch before; then a warning."""
    max_label_share: Fraction = 0.9
    """Largest share of one label in a source whose answers are labels; above it a warning."""
    max_label_drift: Annotated[float, Field(ge=0.0)] = 0.25
    """Kullback-Leibler divergence (nats) of a source's labels to the batch before; above it a warning."""
    suite: str = "instruction_rows"
    """Great Expectations suite of the rows: a name in data_contracts/suites/ or a path to a suite's JSON file."""
    batch_suite: str = "instruction_batch"
    """Suite of the batch as a whole: one row of rates and drift."""


class CustomRule(Section):
    """A rule of your own: a row that breaks any of its limits is rejected under `custom`, with this name."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    field: Literal["prompt", "completion", "any"] = "completion"
    forbidden: str | None = None
    required: str | None = None
    allowed: list[str] | None = None
    min_chars: Annotated[int, Field(ge=0)] | None = None
    max_chars: Annotated[int, Field(ge=0)] | None = None


class RulesSpec(Section):
    actions: dict[_Named, Action] = {}
    """What to do about a reason instead of its default: `quarantine`, `flag` (count and keep) or `off`."""
    repair: bool = True
    """Repair mojibake, entities, control characters and white space; every change is recorded."""
    languages: list[str] = []
    """Languages an answer may be in (ISO 639-1: en, zh); empty allows any."""
    personal_data: Literal["mask", "quarantine", "keep"] = "mask"
    """E-mail, phone, card and national id numbers, addresses of machines: masked, or the row rejected, or kept."""
    secrets: Literal["mask", "quarantine", "keep"] = "quarantine"
    """API keys, tokens, private keys."""
    custom: list[CustomRule] = []
    """Rules of your own: name, field, and `forbidden` or `required` regular expression, `allowed` values, lengths."""
    function: Annotated[str, Field(pattern=r"^.+\.py:[A-Za-z_]\w*$")] | None = None
    """`FILE.py:FUNCTION`, called with (prompt, completion); what it returns other than None rejects the row."""

    @model_validator(mode="after")
    def _limits_are_usable(self) -> "RulesSpec":
        for rule in self.custom:
            for pattern in (rule.forbidden, rule.required):
                try:
                    re.compile(pattern or "")
                except re.error as error:
                    raise ValueError(f"rules.custom {rule.name}: not a regular expression: {error}") from error
        fixed = sorted(reason for reason in self.actions if reason in UNREADABLE | LEAKS)
        if fixed:
            raise ValueError(f"rules.actions: {', '.join(fixed)} cannot be kept: there is no conversation, or it leaks")
        return self


class CurateSpec(Section):
    near_duplicate_threshold: Fraction = 0.7
    """Jaccard similarity of word n-grams from which two rows are the same row; 1 keeps all but exact copies."""
    max_near_duplicate_rate: Fraction = 0.5
    """Largest share of near copies among distinct rows; above it the run stops and the ledger learns nothing."""
    shingle_words: Annotated[int, Field(ge=1)] = 5
    """Words in one n-gram (characters in Chinese, Japanese, Korean and Thai). One changed word in 32 is 0.7 with 5."""
    decontaminate: bool = True
    """Take rows out of training that share 8-grams with more than half of a held-out or benchmark item (Tulu 3)."""
    test_fraction: Fraction = 0.1
    """Share of rows held out for the verdict, by hash of the duplicate cluster. Known rows keep their split for ever."""
    max_test_rows: Annotated[int, Field(ge=1)] = 1000
    """Most rows in the test split; once it is full, new rows go to training."""
    validation_fraction: Fraction = 0.02
    """Share of rows whose loss is measured after training, in addition to the test rows that decide."""
    max_validation_rows: Annotated[int, Field(ge=0)] = 64
    """Most rows in the validation split."""

    @model_validator(mode="after")
    def _some_rows_train(self) -> "CurateSpec":
        if self.test_fraction + self.validation_fraction >= 1.0:
            raise ValueError("test_fraction + validation_fraction must stay below 1: no row would be left to train on")
        return self
