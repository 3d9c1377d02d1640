"""One run at a time on a device that several share: a slot of Prefect's global concurrency limit `tunegate-device`.

Only with a Prefect server that others use too; a run that starts a server of its own has nobody to share with. The limit is
1; raise it for a machine with several devices: `prefect gcl update tunegate-device --limit 2`.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.context import ConcurrencyContext
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.variables import Variable

from tasks.runtime.console import note

LIMIT: Final = "tunegate-device"
_HOLDER: Final = "tunegate_device"  # a Prefect variable: who took the last slot, for the runs that wait
_SERVER_SECONDS: Final = 120.0
_LEASE_SECONDS: Final = 120.0  # renewed after three quarters of it; the slot of a killed holder is free after it


@contextmanager
def device_slot(stage: str) -> Iterator[None]:
    """Hold a slot while the block runs; wait for one as long as it takes; the wait is logged once."""
    if not PREFECT_API_URL.value():
        yield
        return
    _wait_for_server()
    if not _any_free():
        _take_back_or_wait()
    with concurrency(
        LIMIT,
        occupy=1,
        strict=True,  # a missing limit is an error, not no limit at all
        lease_duration=_LEASE_SECONDS,
        holder=ConcurrencyLeaseHolder(type="flow_run", id=UUID(flow_run.id)),
        raise_on_lease_renewal_failure=False,  # hours of training are worth more than a slot
    ):
        lease = _sign(stage)
        try:
            yield
        finally:
            _wait_for_server()
            _give_back(lease)  # `concurrency` does so by the lease only


def _wait_for_server() -> None:
    """A server that was killed is back in half a minute; Prefect's client waits only if it has reached it once before."""
    deadline = time.monotonic() + _SERVER_SECONDS
    with get_client(sync_client=True) as client:
        while error := client.api_healthcheck():
            if time.monotonic() > deadline:
                raise error
            time.sleep(1)


def _any_free() -> bool:
    """Whether a slot is free now. The limit exists from here on."""
    with get_client(sync_client=True) as client:
        limit = find_or_make_limit(client)
    return limit is None or limit.active_slots < limit.limit


def find_or_make_limit(client: SyncPrefectClient) -> GlobalConcurrencyLimitResponse | None:
    """The limit as it is, also if somebody has raised it; None if it was missing and has now been made with one slot."""
    try:
        return client.read_global_concurrency_limit_by_name(LIMIT)
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # another run was faster
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=1))
        return None


def _sign(stage: str) -> UUID:
    """Leave for others who holds the slot, and what frees it should this process be killed: the lease."""
    me, context = psutil.Process(), ConcurrencyContext.get()
    assert context  # a flow's; `concurrency` has put the lease into it
    lease = context.cleanup_lease_ids[-1]
    Variable.set(
        _HOLDER,
        {
            "who": f"{flow_run.name} ({stage}, on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC)",
            "host": socket.gethostname(),
            "pid": me.pid,
            "began": me.create_time(),
            "lease": str(lease),
        },
        overwrite=True,
    )
    return lease


def _give_back(lease: UUID) -> None:
    """Free the slot of a lease, also where the server has been restarted since. With leases in memory, its default, it
    has then forgotten the lease, but not that a slot is taken: giving back by lease would do nothing, without an error."""
    with get_client(sync_client=True) as client:
        try:
            client.renew_concurrency_lease(lease, _LEASE_SECONDS)
            client.release_concurrency_slots_with_lease(lease)
        except PrefectHTTPStatusError as error:
            if error.response.status_code != HTTPStatus.GONE:
                raise
            if _holder().get("lease") == str(lease):  # nobody else has got the slot since
                client.release_concurrency_slots([LIMIT], 1, 1.0)


def _holder() -> dict[str, Any]:
    """Who signed last; empty if nobody has."""
    found: Any = Variable.get(_HOLDER, default=None)
    return dict(found or {})


def _take_back_or_wait() -> None:
    """A killed holder of this machine loses its slot now, not when its lease ends; for any other the wait is logged."""
    holder = _holder()
    if holder and holder["host"] == socket.gethostname() and not _is_alive(holder):
        _give_back(UUID(holder["lease"]))
        note(f"{LIMIT} is taken back from {holder['who']}, which was killed")
    else:
        note(f"waiting for {LIMIT}, held by {holder['who'] if holder else 'another run'}")


def _is_alive(holder: Any) -> bool:
    """Whether the same process still runs: its number may have been given to another one."""
    try:
        process = psutil.Process(holder["pid"])
        return bool(process.create_time() == holder["began"] and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
