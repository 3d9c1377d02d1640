"""Loading (full precision and NF4), chat template, the packed forward pass, generation."""
