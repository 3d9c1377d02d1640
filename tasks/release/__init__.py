"""From an arm to a champion: `register.register_version`, `promotion`, `promotion_ledger`, `registry`."""
