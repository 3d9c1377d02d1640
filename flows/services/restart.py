"""`python -m flows.services.restart COMMAND ...`: stop the leftover child processes of a killed server, then exec the server.

`mlflow server` is a parent of the process that listens. If only the parent is killed, the port stays taken.
"""

import os
import sys
from pathlib import Path

from flows.services.state import MARK, processes, value_of
from flows.services.supervisor import end

_PROGRAM = "SUPERVISOR_PROCESS_NAME"
_SECONDS = 10.0


def end_leftovers_and_become_the_server() -> None:
    mine = os.environ[_PROGRAM]
    end([process for process in processes(Path(os.environ[MARK])) if value_of(process, _PROGRAM) == mine], _SECONDS)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    end_leftovers_and_become_the_server()
