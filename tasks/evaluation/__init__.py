"""Models scored and compared: `evaluate.evaluate_targets`, `compare.compare_models`; gates: `core.gates.judge`."""
