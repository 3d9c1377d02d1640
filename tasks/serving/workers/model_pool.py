"""The versions that a server answers with: adapters on one base where they can share it, and answers as they are written.

Whatever touches a model that answers (writing, another adapter) runs on one thread, in the order it was asked for. So an
answer is one version's from its first token to its last, and an old adapter leaves after its last answer.
"""

import asyncio
import gc
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.cli.serving.utils import GenerateManager

from data_contracts.errors import Problem, StoreError
from tasks.release.workers.served_model import ServedModel, digest
from tasks.runtime.workers.harness import say
from tasks.serving.workers.generation import Answer, Wish

BASE = "base"
_SIDE_BY_SIDE = ("lora", "qlora")  # methods of which PEFT keeps several adapters on one base
Told = dict[str, Any]
"""A version as the registry knows it: name, version, alias or None, adapter (its folder), meta (file), adapter_sha256."""


@dataclass(frozen=True, eq=False)
class Voice:
    """A version that answers, or the base beneath it. adapter: PEFT's name for it; None: no adapter is to be on."""

    label: str
    told: Told
    meta: dict[str, Any]
    model: Any
    tokenizer: Any
    stops: list[int]
    adapter: str | None
    since_unix_seconds: float = field(default_factory=time.time)

    @property
    def base(self) -> "Voice | None":
        """The same model with its adapter off. None if all weights were trained: there is no base beneath them."""
        return replace(self, label=BASE, adapter=None) if isinstance(self.model, PeftModel) else None

    @contextmanager
    def speaking(self) -> Iterator[Any]:
        """The model as it is to answer now."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            if self.model.active_adapter != self.adapter:
                self.model.set_adapter(self.adapter)
            yield self.model

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, as it was trained: with the version's own system prompt if it brings none."""
        own = self.meta["system_prompt"]
        has_own = bool(own) and all(message["role"] != "system" for message in messages)
        whole = [{"role": "system", "content": own}, *messages] if has_own else [*messages]
        text = self.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


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
            except Exception as error:  # noqa: BLE001 whatever it is: the version that answers goes on answering
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


def label(told: Told) -> str:
    """How an answer says who wrote it."""
    return f"{told['name']}/{told['version']}"


def load(told: Told) -> Voice:
    """A version with a base of its own, in the form it was evaluated in: as mlflow.pyfunc loads it."""
    _check(told)
    one = ServedModel()
    one.load_context(SimpleNamespace(artifacts={"adapter": told["adapter"], "meta": told["meta"]}))
    adapter = one.model.active_adapter if isinstance(one.model, PeftModel) else None
    return Voice(label(told), told, one.meta, one.model, one.tokenizer, one.stops, adapter)


def beside(host: Voice, told: Told) -> Voice:
    """A version on the base that another one already answers with."""
    _check(told)
    meta = _meta(told)
    adapter = f"version-{told['version']}-{time.monotonic_ns()}"  # a version that comes back is another adapter to PEFT
    host.model.load_adapter(told["adapter"], adapter_name=adapter)
    host.model.eval()
    stops = host.tokenizer.convert_tokens_to_ids(meta["stops"])
    return Voice(label(told), told, meta, host.model, host.tokenizer, stops, adapter)


def _forget(gone: Sequence[Voice], kept: Sequence[Voice]) -> None:
    """Runs behind all answers that were begun before."""
    for voice in gone:
        adapters = {one.adapter for one in kept if one.model is voice.model}
        if adapters and voice.adapter not in adapters:
            voice.model.delete_adapter(voice.adapter)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _form(meta: dict[str, Any], told: Told) -> str:
    """What two versions must have in common to lie on one base in memory."""
    kind = "side by side" if meta["method"] in _SIDE_BY_SIDE else told["adapter_sha256"]
    return json.dumps([kind, *(meta[key] for key in ("base_digest", "quantisation", "precision"))])


def _meta(told: Told) -> dict[str, Any]:
    return dict(json.loads(Path(told["meta"]).read_text()))


def _check(told: Told) -> None:
    """What answers is what was registered: the adapter's weights, or all files where they are all weights."""
    adapter = Path(told["adapter"])
    weights = adapter / SAFETENSORS_WEIGHTS_NAME
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else digest(adapter)
    if found != told["adapter_sha256"]:
        what = f"its files are not those that were registered: sha256 {found}"
        raise StoreError(Problem(what, label(told), told["adapter_sha256"], "restore them, or train it again"))
