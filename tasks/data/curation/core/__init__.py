"""Pure: near-duplicate search (`minhash`, `near_duplicates`), groups, splits, contamination."""
