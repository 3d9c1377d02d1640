"""What gates said of a registered version: by the run that made it, or later by `tunegate gate`; the newest counts.

The run's report is in the version's evidence; a later one is among the artifacts of the MLflow run that made the version, so
that every machine on one server sees it. A tag holds the verdict too, but what counts is a report about this very adapter.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from data_contracts.lineage import EVIDENCE
from data_contracts.releases import JUDGED_TAG, KeptDecision
from data_contracts.reports import EvalReport, SampleAnswer
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import Decision, Verdict
from tasks.release.registry import Registered
from tasks.runtime.console import best_effort
from tasks.runtime.mlflow_client import attach_file, connect, kept_files, kept_text

_GATE, _EVALUATIONS, _LATER = "gate.json", "evaluations", "judgements"

Evaluation = dict[str, Any]


class KeptJudgement(NamedTuple):
    """file: the report's path among the run's artifacts, sha256: of its text. champion_sha256: adapter of the champion it was
    compared with, None if there was none."""

    verdict: Verdict
    file: str
    sha256: str
    adapter_sha256: str
    champion_sha256: str | None
    answers: list[SampleAnswer]
    precision: str | None

    @property
    def is_later(self) -> bool:
        """Whether `tunegate gate` said it, not the run."""
        return self.file != _GATE


def newest_judgement(store: StoreSpec, version: Registered) -> KeptJudgement | None:
    """The newest judgement of a version's adapter; None if none was kept."""
    later = [path for path in kept_files(store, version.run_id, _LATER) if f"/{version.version}-" in path]
    if later:
        return _by_gate(version.run_id, max(later, key=_time))
    return _by_run(store, version)


def _time(path: str) -> int:
    return int(Path(path).stem.partition("-")[2])


def _by_gate(run_id: str, path: str) -> KeptJudgement:
    text = kept_text(run_id, path)
    found = KeptDecision.model_validate_json(text)
    return KeptJudgement(
        found.decision.gate.verdict, path, _digest(text), found.adapter_sha256, found.champion_adapter_sha256,
        found.answers, found.precision,
    )  # fmt: skip


def _by_run(store: StoreSpec, version: Registered) -> KeptJudgement | None:
    """What the run said of the adapter that it released, and the champion it compared it with."""
    found = _evidence(version) or _artifacts(store, version)
    if found is None:
        return None
    gate, own = found
    champion = json.loads(_text(store, version, f"{_EVALUATIONS}/champion.json") or "{}")
    answers = [SampleAnswer.model_validate(answer) for answer in own["answers"]]
    adapters = (own["adapter_sha256"], champion.get("adapter_sha256"))
    return KeptJudgement(json.loads(gate)["verdict"], _GATE, _digest(gate), *adapters, answers, own.get("precision"))


def _evidence(version: Registered) -> tuple[str, Evaluation] | None:
    """The gate report that was registered with the version, and the evaluation it judged."""
    folder = version.artifacts / EVIDENCE
    if not (folder / _GATE).exists():
        return None
    return (folder / _GATE).read_text(), json.loads((folder / "evaluation.json").read_text())


def _artifacts(store: StoreSpec, version: Registered) -> tuple[str, Evaluation] | None:
    """The same of a version from before it carried them: from the run that made it."""
    gate, comparison = (_text(store, version, name) for name in (_GATE, "comparison.json"))
    released = json.loads(comparison)["released"] if comparison else ""
    own = _text(store, version, f"{_EVALUATIONS}/{released}.json")
    return (gate, json.loads(own)) if gate and own else None


def _text(store: StoreSpec, version: Registered, path: str) -> str | None:
    folder = str(Path(path).parent) if "/" in path else None
    return kept_text(version.run_id, path) if path in kept_files(store, version.run_id, folder) else None


@best_effort("the judgement was not kept with the version, and `tunegate promote` will not know of it")
def keep_judgement(
    store: StoreSpec, version: Registered, champion_sha256: str | None, decision: Decision, own: EvalReport
) -> None:
    """Keep what `tunegate gate` said with the run that made the version. champion_sha256: of its adapter."""
    now = time.time()
    kept = KeptDecision(
        decision=decision, adapter_sha256=version.adapter.sha256, champion_adapter_sha256=champion_sha256, answers=own.answers,
        precision=own.precision, unix_seconds=now,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{version.version}-{int(now * 1000)}.json"
        file.write_text(kept.model_dump_json(indent=1))
        attach_file(store, version.run_id, file, _LATER)
    connect(store).set_model_version_tag(version.name, version.version, JUDGED_TAG, decision.gate.verdict)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
