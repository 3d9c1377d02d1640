"""Pure functions: no Prefect, MLflow, network, clock, environment or global random state."""
