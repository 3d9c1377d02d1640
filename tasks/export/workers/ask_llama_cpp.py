"""Run a GGUF in llama.cpp and compare it with the live model: `python -m tasks.export.workers.ask_llama_cpp spec.json out/`.

The engine is the wheel xllamacpp, which serves on a free port of the loopback interface while this process lives.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import xllamacpp

from data_contracts.exports import Runtime
from data_contracts.jobs.export import LIVE_FILE, TEXTS_FILE, ChatMessages, HeldOutTexts, LlamaCppJob, LlamaCppReport
from tasks.export.core.merging import partial_kl
from tasks.runtime.workers.harness import main, say

_LIKELIEST = 200
_SECONDS = 120.0
_CONTEXT = 2048


def ask_llama_cpp(job: LlamaCppJob, out: Path) -> dict[str, Any]:
    """Compare next tokens, prompts' token ids and the chat template: a LlamaCppReport."""
    say("note", text="asking llama.cpp for next tokens of the held-out answers")
    work = Path(job.work)
    texts = HeldOutTexts.model_validate_json((work / TEXTS_FILE).read_bytes())
    live_NV = np.load(work / LIVE_FILE, mmap_mode="r")
    server = start(job.file)
    client = LlamaCppClient(server.listening_address)
    positions = list(picked(texts, job.positions))
    distances = []
    for ids, place in positions:
        found = client.likeliest(ids)
        distances.append(partial_kl(live_NV[place, list(found)], np.array(list(found.values()), dtype=np.float32)))
        say("progress", what="asking llama.cpp", done=len(distances), of=len(positions))
    same = [client.tokens(text) == ids for text, ids in texts.prompts]
    runtime = Runtime(
        name=f"llama.cpp, xllamacpp {xllamacpp.__version__}",
        kl_nats=float(np.mean(distances)),
        positions=len(positions),
        prompts=len(same),
        same_tokens=sum(same),
    )
    conversations = [client.conversation(messages) for messages in job.messages]
    return LlamaCppReport(runtime=runtime, conversations=conversations).model_dump(mode="json")


def start(file: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = _CONTEXT
    parameters.n_parallel = 1
    parameters.verbosity = -1
    parameters.warmup = False
    if "OMP_NUM_THREADS" in os.environ:  # as for torch: llama.cpp does not read it
        parameters.cpuparams.n_threads = int(os.environ["OMP_NUM_THREADS"])
    return xllamacpp.Server(parameters)


class LlamaCppClient:
    """llama.cpp's own HTTP API. https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    def __init__(self, address: str) -> None:
        self.address = address

    def likeliest(self, ids: list[int]) -> dict[int, float]:
        """Log-probability of each of the likeliest next tokens."""
        reply = self._post(
            "completion",
            {"prompt": ids, "n_predict": 1, "n_probs": _LIKELIEST, "temperature": 0.0, "cache_prompt": True},
        )
        return {found["id"]: found["logprob"] for found in reply["completion_probabilities"][0]["top_logprobs"]}

    def tokens(self, text: str) -> list[int]:
        reply = self._post("tokenize", {"content": text, "add_special": False, "parse_special": True})
        return list(reply["tokens"])

    def conversation(self, messages: ChatMessages) -> str:
        """Written by the chat template in the file."""
        return str(self._post("apply-template", {"messages": messages})["prompt"])

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = requests.post(f"{self.address}/{route}", json=body, timeout=_SECONDS)
        answer.raise_for_status()
        return dict(answer.json())


def picked(texts: HeldOutTexts, most: int) -> Iterator[tuple[list[int], int]]:
    """(all tokens before, place among the live model's rows) of the first answer tokens of every row in turn."""
    found = 0
    each = max(1, most // len(texts.rows))
    for row, place in zip(texts.rows, texts.places, strict=True):
        for step in range(min(each, len(row.ids) - row.start)):
            if found == most:
                return
            yield row.ids[: row.start + step], place + step
            found += 1


if __name__ == "__main__":
    main(ask_llama_cpp, LlamaCppJob)
