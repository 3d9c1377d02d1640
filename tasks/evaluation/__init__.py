"""Score models (`evaluate.evaluate_targets`), compare them (`compare.compare_models`), decide (`core.gates.judge`)."""
