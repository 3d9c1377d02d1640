"""Base models and adapters: `base.prepare_base`, `base.init_adapter`; what may be loaded: `integrity`."""
