"""A registered version made again from its lineage and compared: `reproduce`, `dataset`."""
