"""The challenger gets the champion's questions while no client waits for an answer; both answers go into one file.

Prompts may hold personal data: what looks like some is masked, and the file is its owner's alone.
"""

import asyncio
import json
import os
import time
import traceback
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_contracts.jobs.serving import BASE
from tasks.data.validation.core.personal_data import find_personal_data, mask
from tasks.runtime.workers.harness import say
from tasks.serving.workers.generation import Answer, GenerationRequest
from tasks.serving.workers.loaded_model import LoadedModel
from tasks.serving.workers.model_pool import ModelPool
from tasks.serving.workers.openai_requests import ChatRequest

_MOST_WAITING = 1000
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class _Question:
    """Answered by the champion, not yet by the challenger."""

    messages: list[dict[str, str]]
    request: GenerationRequest
    champion: dict[str, Any]


class Shadow:
    """Questions in the order they were answered; of too many the oldest are left out, and counted."""

    def __init__(self, pool: ModelPool, file: Path) -> None:
        self._pool, self._file = pool, file
        self._waiting: deque[_Question] = deque()
        self.left_out = 0

    def add(self, request: ChatRequest, answer: Answer, text: str) -> None:
        """Keep an answer of the champion for comparison."""
        if self._pool.shadow is None or answer.loaded.label == BASE:
            return
        self._waiting.append(_Question(request.conversation, answer.request, _record(answer, text)))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self.left_out += 1

    async def run(self) -> None:
        """Compare for ever, one at a time, while no client waits for an answer."""
        while True:
            challenger = self._pool.shadow
            if self._waiting and challenger and not self._pool.waiting:
                question = self._waiting.popleft()
                try:
                    await self._ask(challenger, question)
                except Exception as error:  # noqa: BLE001 whatever the challenger does, the champion keeps answering
                    traceback.print_exception(error)  # into the worker's log
                    say(
                        "note",
                        text=f"shadow: {challenger.label} cannot answer: {type(error).__name__}: {error}",
                    )
            await asyncio.sleep(_POLL_SECONDS)

    async def _ask(self, challenger: LoadedModel, question: _Question) -> None:
        request = replace(question.request, prompt=challenger.prompt(question.messages))
        answer = self._pool.start_background_answer(challenger, request)
        text = await answer.text()
        if answer.was_cut:  # a client asked in between: it is written once more
            self._waiting.appendleft(question)
        else:
            self._keep(question, _record(answer, text))

    def _keep(self, question: _Question, challenger: dict[str, Any]) -> None:
        messages = [message | {"content": _masked(message["content"])} for message in question.messages]
        line = {
            "unix_seconds": time.time(),
            "messages": messages,
            "champion": question.champion,
            "challenger": challenger,
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(opened, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _record(answer: Answer, text: str) -> dict[str, Any]:
    return {
        "version": answer.loaded.label,
        "answer": _masked(text),
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "stopped": answer.is_whole,
    }


def _masked(text: str) -> str:
    return mask(text, find_personal_data(text))
