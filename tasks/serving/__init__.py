"""The OpenAI endpoint and the shadow: `endpoint.Endpoint`, `shadow.compare_shadow`."""
