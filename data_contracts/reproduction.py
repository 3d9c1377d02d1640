"""What came out when a registered version was made again from its lineage."""

from typing import Any, Literal

from data_contracts.data_reports import Report

Result = Literal["identical", "equal within tolerance", "different"]

MAX_DISTANCE = 0.05
"""Largest distance of a tensor to the recorded one, as a share of its norm, that counts as equal."""
MAX_LOSS_DIFFERENCE_NATS = 0.005
"""Largest difference of the held-out losses, in nats per token, that counts as equal."""


class Compared(Report):
    """One thing as it was and as it is now. explains: if it differs, the adapter may differ for it."""

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
        told = self.model_dump(mode="json")
        return told | {"compared": [item.model_dump() | {"same": item.same} for item in self.compared]}


def result_of(distance: float | None, loss_then_nats: float | None, loss_now_nats: float | None) -> Result:
    """distance: None if the adapters are the same to the byte. Equal only if both the tensors and the held-out losses are: a
    loss that nobody could measure is not."""
    if distance is None:
        return "identical"
    if loss_then_nats is None or loss_now_nats is None or distance > MAX_DISTANCE:
        return "different"
    near = abs(loss_now_nats - loss_then_nats) <= MAX_LOSS_DIFFERENCE_NATS
    return "equal within tolerance" if near else "different"
