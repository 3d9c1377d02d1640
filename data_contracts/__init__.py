"""What is passed between steps and what is promised about it. Imports pydantic and nothing of ours."""
