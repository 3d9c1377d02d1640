"""Duplicates out, splits that never change, test items out of training: `curate.curate`, `row_ledger`, `explain`."""
