"""Serve a version as OpenAI's API does (`endpoint.Endpoint`), and compare it with its challenger (`shadow.compare_shadow`)."""
