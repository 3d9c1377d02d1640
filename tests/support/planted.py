"""Made-up numbers for reports: every test states those it is about."""

from data_contracts.verdict import Comparison, Estimate


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, error=half / 1.645)


def comparison(released: str, items: int, clusters: int, **measured) -> Comparison:
    """What was not measured is None or empty, as in a real one."""
    empty: dict = {field: {} for field in ("bits_per_byte", "seed_sd", "gains", "accuracy", "accuracy_gains", "forms")}
    empty |= {"detectable": {}, "slices": [], "general": [], "claims": []}
    unknown = ("gain", "champion_gain", "retention", "accuracy_drop", "flips", "stop_rate")
    empty |= dict.fromkeys((*unknown, "memory_saving", "weights_saving", "speed_ratio"))
    named = {"candidate": released, "released": released, "items": items, "clusters": clusters, "seeds": 1}
    return Comparison(**empty | named | measured)
