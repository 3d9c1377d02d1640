"""Compare the models of a run on the items that all of them answered."""

from collections.abc import Sequence

from data_contracts.reports import Comparison, EvalReport, TrainReport
from data_contracts.run_spec import GateSpec
from tasks.core.comparison import compare, read_samples
from tasks.stores import Store


def compare_models(
    store: Store, arms: Sequence[TrainReport], evaluations: Sequence[EvalReport], candidate: str, gates: GateSpec
) -> Comparison:
    """Read each model's per-item samples and compare them, paired by item."""
    scored = {
        report.target: read_samples(store.path(report.samples).read_text().splitlines()) for report in evaluations
    }
    trained: dict[str, TrainReport] = {arm.method: arm for arm in arms}
    return compare(scored, trained, candidate, gates.bootstrap_draws, gates.confidence)
