"""Child processes that make raw rows."""
