"""The `tunegate` command: a module a command group. Entry: `app.main`; what commands print is in `pages/`."""
