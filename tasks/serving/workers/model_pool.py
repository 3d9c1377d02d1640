"""The versions that a server holds: adapters on one base where they can share it, and the answers being written.

Whatever touches a model that answers (writing, another adapter) runs on one thread, in the order of the requests. So an
answer is one version's from its first token to its last, and an old adapter is unloaded after its last answer.
"""

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers.cli.serving.utils import GenerateManager

from data_contracts.jobs.serving import Assignment, ServedVersion
from tasks.runtime.workers.harness import say
from tasks.serving.workers.generation import Answer, GenerationRequest
from tasks.serving.workers.loaded_model import LoadedModel, base_key, load_onto, load_version, read_meta


class ModelPool:
    """The served version and the one compared with it (the shadow). Changing them waits for no answer and stops none."""

    def __init__(self, assignment: Assignment) -> None:
        self._manager = GenerateManager()
        self._one_change = asyncio.Lock()
        self._answers: list[Answer] = []
        self._background: Answer | None = None
        self.shadow: LoadedModel | None = None
        self.failure: str | None = None  # why the last change was not made
        self.served = load_version(assignment.served)
        self.shadow = self._load(assignment.shadow) if assignment.shadow else None

    # --- answers --------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Answers requested and not yet written."""
        self._answers = [answer for answer in self._answers if not answer.is_written]
        return len(self._answers)

    def start_answer(self, loaded: LoadedModel, request: GenerationRequest) -> Answer:
        """Start an answer that a client waits for: the background answer makes room."""
        if self._background:
            self._background.cancel()
        answer = Answer(loaded, request, self._manager)
        self._answers.append(answer)
        return answer

    def start_background_answer(self, loaded: LoadedModel, request: GenerationRequest) -> Answer:
        """Start an answer that no client waits for."""
        self._background = Answer(loaded, request, self._manager)
        return self._background

    # --- changes --------------------------------------------------------------------------------------------

    async def change(self, assignment: Assignment) -> None:
        """Serve these versions from now on. If one cannot be loaded that is reported, and nothing changes."""
        async with self._one_change:
            before = self._all
            try:
                served = await self._find(assignment.served)
                shadow = await self._find(assignment.shadow) if assignment.shadow else None
            except Exception as error:  # noqa: BLE001 whatever it is: the version that answers keeps answering
                self.failure = f"{assignment.served.label} cannot be served: {type(error).__name__}: {error}"
                say("kept", text=self.failure, label=self.served.label)
                return
            self.served, self.shadow, self.failure = served, shadow, None
            await self._manager.async_submit(_unload, [one for one in before if one not in self._all], self._all)
            say("serves", label=served.label, shadow=shadow.label if shadow else None)

    @property
    def _all(self) -> list[LoadedModel]:
        return [self.served, self.shadow] if self.shadow else [self.served]

    async def _find(self, version: ServedVersion) -> LoadedModel:
        """A version that is loaded already; or its adapter on a base that is; or all of it, while others answer."""
        there = next((one for one in self._all if one.version.label == version.label), None)
        if there:  # under another alias it is the same adapter
            return (
                there if there.version == version else replace(there, version=version, since_unix_seconds=time.time())
            )
        if self._host(version):
            found: LoadedModel = await self._manager.async_submit(self._load, version)
            return found
        return await asyncio.to_thread(load_version, version)

    def _load(self, version: ServedVersion) -> LoadedModel:
        host = self._host(version)
        return load_onto(host, version) if host else load_version(version)

    def _host(self, version: ServedVersion) -> LoadedModel | None:
        """A loaded version with the same base."""
        key = base_key(read_meta(version), version)
        return next((one for one in self._all if base_key(one.meta, one.version) == key), None)


def _unload(gone: Sequence[LoadedModel], kept: Sequence[LoadedModel]) -> None:
    """Runs after all answers that were started before."""
    for loaded in gone:
        adapters = {one.adapter_name for one in kept if one.model is loaded.model}
        if adapters and loaded.adapter_name not in adapters:
            loaded.model.delete_adapter(loaded.adapter_name)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
