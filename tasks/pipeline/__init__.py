"""The Prefect tasks (`stages`), their policies and cache keys, locks, notifications."""
