"""The registered model itself, and processes that load a version back and ask it."""
