"""What a run has sent: a webhook on this machine that keeps what it was sent, with Prefect's block for it, and artifacts."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import ArtifactSort

SECRET = "token-that-nobody-may-read"


class _Webhook(BaseHTTPRequestHandler):
    """Answers with the planned statuses first, then with 200; only then a message counts as received."""

    def __init__(self, state: dict, *args) -> None:
        self.state = state
        super().__init__(*args)

    def do_POST(self) -> None:
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.state["failures"].pop(0) if self.state["failures"] else 200
        self.state["asked"].append((self.path, self.headers["Authorization"]))
        if status == 200:
            self.state["messages"].append((sent["subject"], sent["body"]))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


@contextmanager
def webhook() -> Iterator[dict]:
    """Its url, the messages it took, failures to come, and (path, Authorization) of everything it was asked."""
    state: dict = {"messages": [], "failures": [], "asked": []}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Webhook, state)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        state["url"] = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()


def save_block(name: str, url: str) -> str:
    """Its token is in the block's secrets, and goes into the address and a header."""
    block = CustomWebhookNotificationBlock(
        name=name,
        url=f"{url}/{{{{token}}}}",
        headers={"Authorization": "Bearer {{token}}"},
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
        secrets={"token": SECRET},
    )
    block.save(name, overwrite=True)
    return f"custom-webhook/{name}"


def shown(run_id: UUID) -> dict[str, Any]:
    """The newest artifact of each key that a flow run has."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])), sort=ArtifactSort.CREATED_DESC
        )
    return {item.key: item for item in reversed(found) if item.key}
