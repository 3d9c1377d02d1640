"""Heavy child processes (torch at the top), run by a task or by hand: `python -m tasks.workers.NAME spec.json out/`."""

import gc
import sys

if sys.argv[0] == "-m":  # so it reads while Python looks for the module that it is to run
    # Nothing that an import makes is garbage, but looking for some takes a third of the imports' time. harness.main ends this.
    gc.disable()
