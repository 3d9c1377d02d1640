"""What llama.cpp itself makes of a GGUF: `python -m tasks.export.workers.ask_llama_cpp spec.json out/`.

spec: file, work (where export_model left exam.json and live.npy), positions (most answer tokens to compare), messages (lists
of messages to be written by the file's chat template). report: name, kl_nats, positions, prompts, same_tokens, turns.
The engine is the wheel xllamacpp, which serves on a free port of the loopback interface while this process lives.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
import xllamacpp

from tasks.export.core.merging import partial_kl
from tasks.runtime.workers.harness import main, say

_LIKELIEST = 200
_SECONDS = 120.0
_CONTEXT = 2048
Exam = dict[str, Any]


def ask_llama_cpp(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    say("note", text="asking llama.cpp what it makes of the file")
    work = Path(spec["work"])
    exam: Exam = json.loads((work / "exam.json").read_text())
    live_NV = np.load(work / "live.npy", mmap_mode="r")
    server = start(spec["file"])
    ask = Asker(server.listening_address)
    positions = list(picked(exam, spec["positions"]))
    distances = []
    for ids, place in positions:
        found = ask.likeliest(ids)
        distances.append(partial_kl(live_NV[place, list(found)], np.array(list(found.values()), dtype=np.float32)))
        say("progress", what="asking llama.cpp", done=len(distances), of=len(positions))
    same = [ask.tokens(text) == ids for text, ids in exam["prompts"]]
    return {
        "name": f"llama.cpp, xllamacpp {xllamacpp.__version__}",
        "kl_nats": float(np.mean(distances)),
        "positions": len(positions),
        "prompts": len(same),
        "same_tokens": sum(same),
        "turns": [ask.written(messages) for messages in spec["messages"]],
    }


def start(file: str) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = _CONTEXT
    parameters.n_parallel = 1
    parameters.verbosity = -1
    parameters.warmup = False
    if "OMP_NUM_THREADS" in os.environ:  # as for torch: llama.cpp reads it not
        parameters.cpuparams.n_threads = int(os.environ["OMP_NUM_THREADS"])
    return xllamacpp.Server(parameters)


class Asker:
    """llama.cpp's own HTTP API. https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"""

    def __init__(self, address: str) -> None:
        self.address = address

    def likeliest(self, ids: list[int]) -> dict[int, float]:
        """Log-probability of each of the likeliest next tokens."""
        told = self._post(
            "completion",
            {"prompt": ids, "n_predict": 1, "n_probs": _LIKELIEST, "temperature": 0.0, "cache_prompt": True},
        )
        return {found["id"]: found["logprob"] for found in told["completion_probabilities"][0]["top_logprobs"]}

    def tokens(self, text: str) -> list[int]:
        told = self._post("tokenize", {"content": text, "add_special": False, "parse_special": True})
        return list(told["tokens"])

    def written(self, messages: list[dict[str, str]]) -> str:
        """A conversation by the chat template in the file."""
        return str(self._post("apply-template", {"messages": messages})["prompt"])

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = requests.post(f"{self.address}/{route}", json=body, timeout=_SECONDS)
        answer.raise_for_status()
        return dict(answer.json())


def picked(exam: Exam, most: int) -> Iterator[tuple[list[int], int]]:
    """(all tokens before, place among the live model's rows) of the first answer tokens of every row in turn."""
    found = 0
    rows = [(ids, start, place) for (ids, start), place in zip(exam["rows"], exam["places"], strict=True)]
    each = max(1, most // len(rows))
    for ids, start, place in rows:
        for step in range(min(each, len(ids) - start)):
            if found == most:
                return
            yield ids[: start + step], place + step
            found += 1


if __name__ == "__main__":
    main(ask_llama_cpp)
