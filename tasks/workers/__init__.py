"""Heavy child processes (torch at the top), run by a task or by hand: `python -m tasks.workers.NAME spec.json out/`."""
