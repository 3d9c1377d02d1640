"""Is a registered version what was evaluated? In a fresh process: `python -m tasks.release.workers.check_release spec.json out/`.

spec: tracking_uri, model (its verified folder), label, store (its folder, where the base lies), samples [{question, prompt or
null, next_tokens or null}], max_new_tokens. report: answers; differences (for each sample, in nats; null where no tokens were
kept), ms_per_token, peak_bytes, precision.
"""

import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tasks.models.workers.generation import next_log_probabilities
from tasks.release.workers.ask_model import answers, load
from tasks.runtime.workers.device import choose_device, peak_bytes
from tasks.runtime.workers.harness import main

Sample = dict[str, Any]


def check(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    device = choose_device()
    model = load(spec)
    served = model.unwrap_python_model()
    asked = [ask(model, served, sample["question"], spec["max_new_tokens"]) for sample in spec["samples"]]
    return {
        "answers": [answer for answer, _ in asked],
        "differences": [difference(served, sample) for sample in spec["samples"]],
        "ms_per_token": statistics.median(ms for _, ms in asked),
        "peak_bytes": peak_bytes(device),
        "precision": precision(served.model),
    }


def ask(model: Any, served: Any, question: str, most_tokens: int) -> tuple[str, float]:
    """The answer as anybody gets it from the registry, and its milliseconds for each token. A stop token counts."""
    started = time.monotonic()
    (answer,) = answers(model, [question], most_tokens)
    ms = (time.monotonic() - started) * 1000
    tokens = len(served.tokenizer(answer, add_special_tokens=False)["input_ids"])
    return answer, ms / min(tokens + 1, most_tokens)


def difference(served: Any, sample: Sample) -> float | None:
    """How far the log-probabilities of its next tokens lie from those that were kept, on average, each token by its
    probability then: of unlikely ones rounding shifts the logarithm furthest. Infinite if one is not a number now."""
    if sample["next_tokens"] is None:
        return None
    prompt = served.tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"]
    nats_V = next_log_probabilities(served.model, prompt, served.stops[0])
    ids, kept = zip(*sample["next_tokens"], strict=True)
    if max(ids) >= len(nats_V):
        return math.inf  # another vocabulary
    then = torch.tensor(kept)
    mean = ((nats_V[list(ids)] - then).abs() * then.softmax(-1)).sum().item()
    return mean if math.isfinite(mean) else math.inf


def precision(model: Any) -> str:
    """What it computes in: a quantised base keeps its other weights in that format."""
    dtype = next(weight.dtype for weight in model.parameters() if weight.is_floating_point())
    return "bf16" if dtype == torch.bfloat16 else "fp32"


if __name__ == "__main__":
    main(check)
