"""The versions that a server answers with: adapters on one base where they can share it, and answers as they are written.

Whatever touches a model that answers (writing, another adapter) runs on one thread, in the order it was asked for. So an
answer is one version's from its first token to its last, and an old adapter leaves after its last answer.
"""

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.cli.serving.utils import GenerateManager

from tasks.runtime.workers.harness import say
from tasks.serving.workers.generation import Answer, Wish
from tasks.serving.workers.loaded_model import Told, Voice, _form, _meta, beside, label, load


class Voices:
    """Who is served, and who is compared with it (the shadow). Changing them waits for no answer and stops none."""

    def __init__(self, served: Told, shadow: Told | None) -> None:
        self._manager = GenerateManager()
        self._one_change = asyncio.Lock()
        self._answers: list[Answer] = []
        self._aside: Answer | None = None
        self.shadow: Voice | None = None
        self.failure: str | None = None  # why the last change was not made
        self.served = load(served)
        self.shadow = self._new(shadow) if shadow else None

    # --- answers --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Answers asked for and not yet written."""
        self._answers = [answer for answer in self._answers if not answer.is_written]
        return len(self._answers)

    def write(self, voice: Voice, wish: Wish) -> Answer:
        """Begin an answer for somebody who waits for it: one written aside makes room."""
        if self._aside:
            self._aside.cancel()
        answer = Answer(voice, wish, self._manager)
        self._answers.append(answer)
        return answer

    def write_aside(self, voice: Voice, wish: Wish) -> Answer:
        """Begin an answer that nobody waits for."""
        self._aside = Answer(voice, wish, self._manager)
        return self._aside

    # --- changes --------------------------------------------------------------------------------------------

    async def change(self, served: Told, shadow: Told | None) -> None:
        """Serve these from now on. If one cannot be loaded that is told, and all stays as it is."""
        async with self._one_change:
            before = self._all
            try:
                new = await self._found(served)
                shade = await self._found(shadow) if shadow else None
            except Exception as error:  # noqa: BLE001 whatever it is: the version that answers keeps answering
                self.failure = f"{label(served)} cannot be served: {type(error).__name__}: {error}"
                say("kept", text=self.failure, label=self.served.label)
                return
            self.served, self.shadow, self.failure = new, shade, None
            await self._manager.async_submit(_forget, [one for one in before if one not in self._all], self._all)
            say("serves", label=new.label, shadow=shade.label if shade else None)

    @property
    def _all(self) -> list[Voice]:
        return [self.served, self.shadow] if self.shadow else [self.served]

    async def _found(self, told: Told) -> Voice:
        """A version that is loaded already; or its adapter on a base that is; or all of it, beside the answers."""
        there = next((one for one in self._all if label(one.told) == label(told)), None)
        if there:  # under another alias it is another voice, of the same adapter
            return there if there.told == told else replace(there, told=told, since_unix_seconds=time.time())
        if self._host(told):
            found: Voice = await self._manager.async_submit(self._new, told)
            return found
        return await asyncio.to_thread(load, told)

    def _new(self, told: Told) -> Voice:
        host = self._host(told)
        return beside(host, told) if host else load(told)

    def _host(self, told: Told) -> Voice | None:
        form = _form(_meta(told), told)
        return next((one for one in self._all if _form(one.meta, one.told) == form), None)


def _forget(gone: Sequence[Voice], kept: Sequence[Voice]) -> None:
    """Runs behind all answers that were begun before."""
    for voice in gone:
        adapters = {one.adapter for one in kept if one.model is voice.model}
        if adapters and voice.adapter not in adapters:
            voice.model.delete_adapter(voice.adapter)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
