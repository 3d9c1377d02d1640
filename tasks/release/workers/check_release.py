"""Is a registered version what was evaluated? In a fresh process: `python -m tasks.release.workers.check_release spec.json out/`.

spec: data_contracts.jobs.release.CheckReleaseJob; report: CheckReleaseReport.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from data_contracts.jobs.release import CheckReleaseJob, CheckReleaseReport, CheckSample
from tasks.models.workers.generation import next_log_probabilities
from tasks.release.workers.ask_model import answer_questions, load_registered
from tasks.runtime.workers.device import choose_device, peak_bytes
from tasks.runtime.workers.harness import main


def compare_with_evaluation(job: CheckReleaseJob, out: Path) -> dict[str, Any]:
    device = choose_device()
    model = load_registered(job.version)
    served = model.unwrap_python_model()
    timed = [_timed_answer(model, served, sample.question, job.max_new_tokens) for sample in job.samples]
    report = CheckReleaseReport(
        answers=[answer for answer, _ in timed],
        differences=[_nats_apart(served, sample) for sample in job.samples],
        ms_per_token=statistics.median(ms for _, ms in timed),
        peak_bytes=peak_bytes(device),
        precision=_precision(served.model),
    )
    return report.model_dump()  # as Python numbers: a difference may be infinite, which pydantic's JSON would drop


def _timed_answer(model: Any, served: Any, question: str, max_new_tokens: int) -> tuple[str, float]:
    """The answer as anybody gets it from the registry, and its milliseconds for each token. A stop token counts."""
    started = time.monotonic()
    (answer,) = answer_questions(model, [question], max_new_tokens)
    ms = (time.monotonic() - started) * 1000
    tokens = len(served.tokenizer(answer, add_special_tokens=False)["input_ids"])
    return answer, ms / min(tokens + 1, max_new_tokens)


def _nats_apart(served: Any, sample: CheckSample) -> float | None:
    """How far the log-probabilities of its next tokens are from those that were kept, on average, each token weighted by its
    probability then: of unlikely ones rounding shifts the logarithm furthest. Infinite if one is not a number now."""
    if sample.next_tokens is None:
        return None
    prompt = served.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    nats_V = next_log_probabilities(served.model, prompt, served.stops[0])
    ids, kept = zip(*sample.next_tokens, strict=True)
    if max(ids) >= len(nats_V):
        return math.inf  # another vocabulary
    then = torch.tensor(kept)
    mean = ((nats_V[list(ids)] - then).abs() * then.softmax(-1)).sum().item()
    return mean if math.isfinite(mean) else math.inf


def _precision(model: Any) -> str:
    """What it computes in: a quantised base keeps its other weights in that format."""
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return "bf16" if dtype == torch.bfloat16 else "fp32"


if __name__ == "__main__":
    main(compare_with_evaluation, CheckReleaseJob)
