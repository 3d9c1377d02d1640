"""The server process: `serve_model`, `openai_api`, the models it holds."""
