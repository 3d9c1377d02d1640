"""Processes that merge, convert, and read the written files back."""
