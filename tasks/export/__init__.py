"""A version as files outside of the store, measured against the live model: `steps`, `request`, `gguf`."""
