"""The process that compares two adapters."""
