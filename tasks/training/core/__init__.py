"""Pure: the memory formulas of the planner and which cards a step fits."""
