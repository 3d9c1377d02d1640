"""Presets, YAML files and `--set` become one RunSpec: `load.load_spec`; what is wrong with it: `validation_errors`."""
