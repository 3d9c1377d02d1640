"""One loaded version: an adapter on its base, in the form it was evaluated in."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from data_contracts.errors import Problem, StoreError
from tasks.release.workers.served_model import ServedModel, folder_digest

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
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else folder_digest(adapter)
    if found != told["adapter_sha256"]:
        what = f"its files are not those that were registered: sha256 {found}"
        raise StoreError(Problem(what, label(told), told["adapter_sha256"], "restore them, or train it again"))
