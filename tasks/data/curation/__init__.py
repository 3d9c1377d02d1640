"""Duplicates out, splits that never change, test items out of training: `curate.curate_rows`, `row_ledger`, `explain`."""
