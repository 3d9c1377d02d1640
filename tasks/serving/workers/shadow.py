"""The challenger gets what the champion was asked, when nobody waits for an answer; both answers go into one file.

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

from tasks.data.validation.core.personal_data import find_personal_data, mask
from tasks.runtime.workers.harness import say
from tasks.serving.workers.generation import Answer, Wish
from tasks.serving.workers.loaded_model import BASE, Voice
from tasks.serving.workers.model_pool import Voices
from tasks.serving.workers.openai_requests import ChatRequest

_MOST_WAITING = 1000
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class _Pair:
    """A question that the champion has answered, and the challenger has not."""

    messages: list[dict[str, str]]
    wish: Wish
    champion: dict[str, Any]


class Shadow:
    """Questions in the order they were answered; of too many the oldest are left out, and counted."""

    def __init__(self, voices: Voices, file: Path) -> None:
        self._voices, self._file = voices, file
        self._waiting: deque[_Pair] = deque()
        self.left_out = 0

    def hear(self, asked: ChatRequest, answer: Answer, text: str) -> None:
        if self._voices.shadow is None or answer.voice.label == BASE:
            return
        self._waiting.append(_Pair(asked.conversation, answer.wish, _record(answer, text)))
        if len(self._waiting) > _MOST_WAITING:
            self._waiting.popleft()
            self.left_out += 1

    async def run(self) -> None:
        """Compare for ever, one at a time, whenever nobody waits for an answer."""
        while True:
            challenger = self._voices.shadow
            if self._waiting and challenger and not self._voices.waiting:
                pair = self._waiting.popleft()
                try:
                    await self._ask(challenger, pair)
                except Exception as error:  # noqa: BLE001 whatever the challenger does, the champion keeps answering
                    traceback.print_exception(error)  # into the worker's log
                    say(
                        "note",
                        text=f"shadow: {challenger.label} cannot answer: {type(error).__name__}: {error}",
                    )
            await asyncio.sleep(_LOOK_SECONDS)

    async def _ask(self, challenger: Voice, pair: _Pair) -> None:
        wish = replace(pair.wish, prompt=challenger.prompt(pair.messages))
        answer = self._voices.write_aside(challenger, wish)
        text = await answer.text()
        if answer.was_cut:  # somebody asked in between: it is written once more
            self._waiting.appendleft(pair)
        else:
            self._keep(pair, _record(answer, text))

    def _keep(self, pair: _Pair, challenger: dict[str, Any]) -> None:
        messages = [message | {"content": _masked(message["content"])} for message in pair.messages]
        line = {"unix_seconds": time.time(), "messages": messages, "champion": pair.champion, "challenger": challenger}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(opened, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _record(answer: Answer, text: str) -> dict[str, Any]:
    return {
        "version": answer.voice.label,
        "answer": _masked(text),
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "stopped": answer.is_whole,
    }


def _masked(text: str) -> str:
    return mask(text, find_personal_data(text))
