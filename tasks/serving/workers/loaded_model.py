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
from data_contracts.jobs.serving import BASE, ServedVersion
from tasks.release.workers.served_model import ServedModel, folder_digest

_SHARED_BASE_METHODS = ("lora", "qlora")  # methods of which PEFT keeps several adapters on one base


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A version that answers, or the base under its adapter. adapter_name: PEFT's; None: without adapter."""

    label: str
    version: ServedVersion
    meta: dict[str, Any]
    model: Any
    tokenizer: Any
    stops: list[int]
    adapter_name: str | None
    since_unix_seconds: float = field(default_factory=time.time)

    @property
    def base(self) -> "LoadedModel | None":
        """The same model with its adapter off. None if all weights were trained: then there is no base."""
        return replace(self, label=BASE, adapter_name=None) if isinstance(self.model, PeftModel) else None

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this version's adapter on, or with none for the base."""
        if not isinstance(self.model, PeftModel):
            yield self.model
        elif self.adapter_name is None:
            with self.model.disable_adapter():
                yield self.model
        else:
            if self.model.active_adapter != self.adapter_name:
                self.model.set_adapter(self.adapter_name)
            yield self.model

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, as it was trained: with the version's own system prompt if it brings none."""
        own = self.meta["system_prompt"]
        has_own = bool(own) and all(message["role"] != "system" for message in messages)
        whole = [{"role": "system", "content": own}, *messages] if has_own else [*messages]
        text = self.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_version(version: ServedVersion) -> LoadedModel:
    """A version with a base of its own, in the form it was evaluated in: as mlflow.pyfunc loads it."""
    _check(version)
    one = ServedModel()
    artifacts = {"adapter": version.adapter_folder, "meta": version.meta_file}
    one.load_context(SimpleNamespace(artifacts=artifacts))
    adapter_name = one.model.active_adapter if isinstance(one.model, PeftModel) else None
    return LoadedModel(version.label, version, one.meta, one.model, one.tokenizer, one.stops, adapter_name)


def load_onto(host: LoadedModel, version: ServedVersion) -> LoadedModel:
    """A version on the base of a loaded one."""
    _check(version)
    meta = read_meta(version)
    # A version that comes back is another adapter to PEFT.
    adapter_name = f"version-{version.version}-{time.monotonic_ns()}"
    host.model.load_adapter(version.adapter_folder, adapter_name=adapter_name)
    host.model.eval()
    stops = host.tokenizer.convert_tokens_to_ids(meta["stops"])
    return LoadedModel(version.label, version, meta, host.model, host.tokenizer, stops, adapter_name)


def base_key(meta: dict[str, Any], version: ServedVersion) -> str:
    """What two versions must have in common to share one base in memory."""
    kind = "side by side" if meta["method"] in _SHARED_BASE_METHODS else version.adapter_sha256
    return json.dumps([kind, *(meta[key] for key in ("base_digest", "quantisation", "precision"))])


def read_meta(version: ServedVersion) -> dict[str, Any]:
    """The version's meta.json, see tasks/release/registry.py."""
    return dict(json.loads(Path(version.meta_file).read_text()))


def _check(version: ServedVersion) -> None:
    """What answers is what was registered: the adapter's weights, or all files where they are all weights."""
    folder = Path(version.adapter_folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else folder_digest(folder)
    if found != version.adapter_sha256:
        what = f"its files are not those that were registered: sha256 {found}"
        raise StoreError(Problem(what, version.label, version.adapter_sha256, "restore them, or train it again"))
