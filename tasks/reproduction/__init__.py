"""Make a registered version again from its lineage and compare: `dataset.rebuild_splits`, `reproduce.train_again`, `compare_again`."""
