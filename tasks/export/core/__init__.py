"""Pure: which merged form is nearest, and Modelfiles."""
