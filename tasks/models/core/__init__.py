"""Pure: sequences packed as a prefix tree, files and scan of adapters."""
