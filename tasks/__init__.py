"""One step each: thin Prefect tasks that load, call, save and log."""
