"""Compare the models of a run on the items that all of them answered."""

from collections.abc import Sequence

from data_contracts.data_reports import FileRef
from data_contracts.errors import DataError
from data_contracts.reports import EvalReport, TrainReport
from data_contracts.run_spec import GateSpec
from data_contracts.verdict import Comparison, Estimate
from tasks.evaluation.core.candidate import NLL
from tasks.evaluation.core.comparison import bootstrap, compare_arms
from tasks.evaluation.core.samples import gather, read_facts, read_samples
from tasks.evaluation.core.stats import ratio
from tasks.runtime.store import Store


def compare_models(
    store: Store, arms: Sequence[TrainReport], evaluations: Sequence[EvalReport], candidate: str, released: str,
    gates: GateSpec,
) -> Comparison:  # fmt: skip
    """Read each model's per-item samples and compare them, paired by item."""
    scored = {report.target: read_samples(_lines(store, report.samples)) for report in evaluations}
    facts = read_facts(_lines(store, evaluations[0].facts))
    return compare_arms(scored, facts, arms, candidate, released, gates)


def loss_difference(
    first_store: Store, first: EvalReport, other_store: Store, other: EvalReport, gates: GateSpec
) -> Estimate | str:
    """Loss of the first minus that of the other on the items both answered, nats per token; or why there is none."""
    if first.items_sha256 != other.items_sha256:
        return "other test items"
    scored = {
        "first": read_samples(_lines(first_store, first.samples)),
        "other": read_samples(_lines(other_store, other.samples)),
    }
    try:
        nll = gather(scored, NLL, {name: [name] for name in scored})
    except DataError as error:
        return error.problems[0].what
    if nll is None or len(nll.values) < 2:
        return "no loss was measured"
    draws = bootstrap(nll, read_facts(_lines(other_store, other.facts)), gates)
    return draws.estimate(ratio, nll.first("first") - nll.first("other"), nll.tokens_I)


def _lines(store: Store, file: FileRef) -> list[str]:
    return store.path(file).read_text(encoding="utf-8").splitlines()
