"""Pure: statistics, paired comparison, gates, items and slices."""
