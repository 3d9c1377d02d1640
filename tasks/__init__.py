"""A folder a subject: its steps, `core/` = pure functions, `workers/` = child processes with torch."""

import gc
import sys

if sys.argv[0] == "-m":  # so it reads while Python looks for the worker that it is to run
    # Nothing that an import makes is garbage, but looking for some takes a third of the imports' time. harness.main ends this.
    gc.disable()
