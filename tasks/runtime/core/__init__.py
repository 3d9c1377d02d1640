"""What steps and workers share: files that are complete or absent, locks between processes."""
