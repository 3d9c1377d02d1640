"""Flow runs whose process was killed: outside a worker Prefect never hears of it and shows them as running for ever."""

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.stages import tell
from tasks.turns import Holder


def bury(dead: Holder) -> None:
    """Set the run of a killed process to Crashed; nothing to do if this server does not know it or it has ended."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(dead.flow_run_id))
        except ObjectNotFound:
            return
        if found.state is None or not found.state.is_final():
            message = f"its process {dead.process} on {dead.host} was killed; the next run goes on from what it left"
            client.set_flow_run_state(found.id, Crashed(message=message), force=True)
    tell(f"an earlier run was killed: {dead.name}; going on from what it left")
