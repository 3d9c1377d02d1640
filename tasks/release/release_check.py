"""Before a version is released: loaded from the registry in a fresh process, is it the model that was evaluated?"""

import math
import shutil
import time
import uuid
from typing import NamedTuple

from data_contracts.errors import Problem, StoreError
from data_contracts.jobs.release import CheckReleaseJob, CheckReleaseReport, CheckSample
from data_contracts.reports import EvalReport, LoadedBack, ModelVersion, ReleaseCheck, SampleAnswer
from data_contracts.run_spec import StoreSpec
from tasks.release.registry import EXAMPLE, Registered, load_job, resolve
from tasks.runtime.processes import Launch, run_worker
from tasks.runtime.store import Store

# How far log-probabilities may be from the evaluation's, in nats: measured in docs/release.md. bf16: on either side.
TOLERANCE_NATS = {"fp32": 1e-3, "bf16": 0.3}
_EXAMPLE = SampleAnswer(question=EXAMPLE, reference="", answer="")


class ReleaseLimits(NamedTuple):
    """Settings of the run that made the version, as its gates read them; None: no limit."""

    sample_tokens: int
    max_ms_per_token: float | None = None
    max_memory_gb: float | None = None


class CheckedVersion(NamedTuple):
    check: ReleaseCheck
    answers: list[str]


def check_release(
    store: StoreSpec, version: Registered, evaluated: list[SampleAnswer], precision: str | None, limits: ReleaseLimits
) -> CheckedVersion:
    """Load the version, answer the sample questions, compare what may follow each prompt with what was evaluated."""
    samples = [
        CheckSample(question=sample.question, prompt=sample.prompt, next_tokens=sample.next_tokens)
        for sample in evaluated or [_EXAMPLE]
    ]
    job = CheckReleaseJob(version=load_job(store, version), samples=samples, max_new_tokens=limits.sample_tokens)
    out, started = Store.of(store).files / "checks" / uuid.uuid4().hex, time.monotonic()
    found = run_worker("tasks.release.workers.check_release", job, out, Launch(f"check {version.label}"))
    shutil.rmtree(out)  # only a failed one is kept, with its log
    report = CheckReleaseReport.model_validate(found)
    check = _compared(report, evaluated, precision, limits, time.monotonic() - started)
    return CheckedVersion(check, report.answers)


def _compared(
    found: CheckReleaseReport, evaluated: list[SampleAnswer], precision: str | None, limits: ReleaseLimits,
    seconds: float,
) -> ReleaseCheck:  # fmt: skip
    differences = [each for each in found.differences if each is not None]
    tolerance = max(TOLERANCE_NATS[name] for name in (found.precision, precision or "fp32"))
    check = ReleaseCheck(
        questions=len(found.answers),
        answered_alike=sum(then.answer == now for then, now in zip(evaluated, found.answers, strict=False)),
        difference_nats=max(differences, default=None),
        tolerance_nats=tolerance,
        precision=found.precision,
        ms_per_token=found.ms_per_token,
        peak_bytes=found.peak_bytes,
        seconds=seconds,
        refusals=[],
    )
    silent = any(then.answer and not now for then, now in zip(evaluated, found.answers, strict=False))
    refusals = ["it answers nothing"] if silent else []
    return check.model_copy(update={"refusals": [*refusals, *_refusals(check, bool(evaluated), limits)]})


def _refusals(check: ReleaseCheck, has_samples: bool, limits: ReleaseLimits) -> list[str]:
    lines: list[str] = []
    if check.difference_nats is not None and check.difference_nats > check.tolerance_nats:
        lines.append(
            f"it is not the model that was evaluated: log-probabilities of next tokens differ by {check.difference_nats:.3g}"
            f" nats, at most {check.tolerance_nats:g} is rounding"
        )
    if has_samples and check.difference_nats is None:
        lines.append("its evaluation kept no log-probabilities to compare with: tunegate gate evaluates it again")
    if check.ms_per_token > (limits.max_ms_per_token or math.inf):
        lines.append(f"{check.ms_per_token:.3g} ms per token, gates.max_ms_per_token is {limits.max_ms_per_token:g}")
    if check.peak_bytes / 1e9 > (limits.max_memory_gb or math.inf):
        lines.append(f"{check.peak_bytes / 1e9:.3g} GB at the peak, gates.max_memory_gb is {limits.max_memory_gb:g}")
    return lines


def load_back(store: StoreSpec, model: ModelVersion, scores: EvalReport, sample_tokens: int) -> LoadedBack:
    """Check the version that a run has just registered. Raises StoreError if it is not what the run evaluated; time and
    memory were for the gates."""
    version = resolve(store, f"models:/{model.name}/{model.version}")
    check, answers = check_release(store, version, scores.answers, scores.precision, ReleaseLimits(sample_tokens))
    if check.refusals and _has_numbers(scores):
        act = "it was not promoted; look at its run"
        raise StoreError(*(Problem(line, version.label, act=act) for line in check.refusals))
    sample = scores.answers[0] if scores.answers else None
    return LoadedBack(
        question=(sample or _EXAMPLE).question,
        answer=answers[0],
        as_evaluated=answers[0] == sample.answer if sample else None,
        check=check,
    )


def _has_numbers(scores: EvalReport) -> bool:
    """A model that computes no numbers has its verdict already: its gates fail."""
    return all(sample.next_tokens for sample in scores.answers)
