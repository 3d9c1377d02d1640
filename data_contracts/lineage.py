"""What a registered version is made of: everything that is needed to check it, to judge it again, and to make it again.

The version holds this as `artifacts/evidence/lineage.json`; its sha256 is the version's tag `tunegate.lineage_sha256`, and it
names the sha256 of every other file of the version. So the registry vouches for one file, and that file for all others.
It holds no path of any machine: places are relative to the version or to the store.
"""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from data_contracts.data_reports import Report
from data_contracts.reports import AdapterRef, BaseModelRef, Quantisation, Start
from data_contracts.train_spec import Method
from data_contracts.verdict import Verdict

LINEAGE_TAG = "tunegate.lineage_sha256"
EVIDENCE = "evidence"  # folder in the version's artifacts
LINEAGE_FILE = "lineage.json"


class Code(Report):
    """What trained the version. digest: of the modules that the train stage uses, as in its cache key."""

    version: str  # of Tunegate
    commit: str | None  # of the git checkout it ran from; None: an installed package
    dirty: bool | None  # files of the checkout differ from that commit
    digest: str


class Machine(Report):
    """Where it was trained. packages: every installed distribution by name, its version: the lock."""

    python: str
    platform: str
    processor: str
    device: str
    precision: str
    threads: int
    packages: dict[str, str]


class DataLineage(Report):
    """The rows, by content. Splits are named by the sha256 of their files."""

    snapshot_id: str
    sources: dict[str, str]  # name of a source file -> sha256
    source_rows: dict[str, int] = Field(default_factory=dict)  # name -> rows; with them the snapshot can be checked
    ledger_sha256: str = ""  # what the row ledger had recorded of this snapshot for this model: the fate of every row
    train_sha256: str
    validation_sha256: str
    test_sha256: str
    trained_rows_sha256: str  # ids of all rows it ever saw, its ancestors' included
    contract_sha256: str  # the result of the data contract
    rows_in: int
    rows_kept: int
    licence: str  # SPDX id or text; "unknown" if nobody said


class Training(Report):
    """The arm that became the version."""

    name: str
    method: Method
    quantisation: Quantisation | None
    seed: int
    adapter: AdapterRef  # folder relative to the store
    step0_sha256: str | None
    start: Start | None
    # Of `train`, as this arm read them; the second name is that of versions made before 0.2.
    settings: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("settings", "dials"))]


class Judgement(Report):
    """What its gates said, of which items. The reports themselves are next to this file, under their sha256 in `files`."""

    verdict: Verdict
    items_sha256: str
    nll_nats: float | None
    candidate: str
    # The version it was compared with; None: none was in production. The second name is that of versions made before 0.2.
    champion: Annotated[str | None, Field(validation_alias=AliasChoices("champion", "rival"))]


class Lineage(Report):
    name: str  # in the registry
    key: str  # content key of the register stage
    run: str  # MLflow's id of the run that made it
    made_unix_seconds: float
    spec: dict[str, Any]  # the RunSpec, without its store
    base: BaseModelRef
    base_licence: str
    data: DataLineage
    training: Training
    judgement: Judgement
    code: Code
    machine: Machine
    files: dict[str, str]  # every other file of the version's artifacts: relative path -> sha256


Result = Literal["identical", "equal within tolerance", "different"]

MAX_DISTANCE = 0.05
"""Largest distance of a tensor to the recorded one, as a share of its norm, that counts as equal."""
MAX_LOSS_DIFFERENCE_NATS = 0.005
"""Largest difference of the held-out losses, in nats per token, that counts as equal."""


class Compared(Report):
    """One thing as it was and as it is now. explains: if it differs, the adapter may differ because of it."""

    what: str
    then: str
    now: str
    explains: bool = True

    @property
    def same(self) -> bool:
        return self.then == self.now


class Reproduction(Report):
    """distance and losses: only where the adapter is not the same to the byte. Losses: of both adapters, measured now."""

    model: str
    result: Result
    compared: list[Compared]
    data: str  # where the rows came from this time
    adapter_then: str
    adapter_now: str
    distance: float | None
    loss_then_nats: float | None
    loss_now_nats: float | None
    reasons: list[str]
    kept: str | None  # folder of the store with what was trained; None: it was the same and is gone
    seconds: float

    def payload(self) -> dict[str, Any]:
        """For --json: each thing compared says itself whether it is the same."""
        return self.model_dump(mode="json") | {
            "compared": [item.model_dump() | {"same": item.same} for item in self.compared]
        }


def result_of(distance: float | None, loss_then_nats: float | None, loss_now_nats: float | None) -> Result:
    """distance: None if the adapters are the same to the byte. Equal only if both the tensors and the held-out losses are: a
    loss that nobody could measure is not."""
    if distance is None:
        return "identical"
    if loss_then_nats is None or loss_now_nats is None or distance > MAX_DISTANCE:
        return "different"
    near = abs(loss_now_nats - loss_then_nats) <= MAX_LOSS_DIFFERENCE_NATS
    return "equal within tolerance" if near else "different"
