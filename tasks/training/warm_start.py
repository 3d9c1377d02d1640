"""Where a warm-started arm begins: at the champion's adapter, and on which rows; or why it starts from scratch."""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.reports import Origin, Start
from data_contracts.run_spec import StoreSpec
from data_contracts.stage_inputs import StartInputs
from data_contracts.train_spec import LORA_ARMS
from tasks.data.curation.trained_rows import ids_of, publish_ids, read_ids
from tasks.models.core.adapter_files import CONFIG, WEIGHTS
from tasks.models.integrity import adapter_ref
from tasks.release import registry
from tasks.release.registry import Registered
from tasks.runtime.store import Store, content_key, digest


class AdapterShape(NamedTuple):
    """An adapter as PEFT's configuration and the names of its tensors describe it."""

    config: Mapping[str, Any]
    tensors: Collection[str]

    @property
    def layers(self) -> set[str]:
        """target_modules can name the same layers in several ways."""
        return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self.tensors}


class ChosenRows(NamedTuple):
    """Row ids of a warm start: new to the version, known to it, and the known ones that are replayed."""

    new: list[str]
    old: list[str]
    replayed: list[str]


def origin_of(store: StoreSpec, name: str, train: Path) -> tuple[Origin, list[str]]:
    """The newest version in the champion's line that some training row is new to, and the versions that were passed
    over.

    So the same command over the same rows starts where it started before, also when what it made is champion by now. No
    version is named if there is no champion, or all of its line has seen every row, or a version's rows are not known.
    """
    here = set(ids_of(train))
    passed: list[str] = []
    found = registry.champion(store, name)
    if found is None:
        return Origin(note=f"{name} has no champion yet"), []
    while True:
        if problem := _unknown(found):
            return Origin(note=problem), passed
        if here - set(read_ids(_trained(found))):
            return origin_at(found), passed
        passed.append(f"{found.label} was trained on every row that is here")
        if found.started_from is None:
            return Origin(note=f"nothing is new to {found.label}, which started from scratch"), passed
        try:
            found = registry.resolve(store, f"models:/{name}/{found.started_from}")
        except ConfigError:
            gone = f"version {found.started_from}, which it started from, is no longer registered"
            return Origin(note=f"nothing is new to {found.label}, and {gone}"), passed


def _unknown(found: Registered) -> str | None:
    """Why it is not known which rows a version was trained on; None if it is."""
    if found.trained is None:
        return f"{found.label} has no tag {registry.TRAINED_TAG}: it was registered before its training rows were kept"
    if not Path(found.trained.path).exists():
        return f"{Path(found.trained.path).name}, the training rows of {found.label}, is gone from the registry"
    return None


def _trained(found: Registered) -> Path:
    assert found.trained
    return _checked(Path(found.trained.path), found.trained.sha256, found.label)


def _checked(file: Path, sha256: str, label: str) -> Path:
    """A file of a registered version. Raises StoreError if it is not there or not the one that its tag names."""
    found = digest(file) if file.exists() else "no file"
    if found != sha256:
        what = f"{file.name} of {label} is not the file that was registered ({found[:12]} instead of {sha256[:12]})"
        act = "restore the registry's artifacts from a backup, roll back to a whole version, or set train.warm_start=never"
        raise StoreError(Problem(what, str(file.parent), act=act))
    return file


def origin_at(found: Registered) -> Origin:
    """A version as what a warm start begins with."""
    return Origin(
        note=found.label,
        version=found.version,
        method=found.method,
        base_digest=found.base_digest,
        adapter=found.adapter,
        trained=found.trained,
    )


def start_from_scratch(store: Store, train: FileRef, why: str) -> Start:
    """A fresh start on all training rows."""
    count = len(ids_of(store.path(train)))
    return Start(
        version=None, note=why, adapter=None, rows=train, new_rows=count, old_rows=0, replayed_rows=0, trained=None
    )


def choose_start(store: Store, inputs: StartInputs, replay_share: float) -> Start:
    """Resume from a version's adapter, on the rows that are new to it and a share of the others; or start from scratch.

    The version's adapter must have the shape of `inputs.step0`, the arm's fresh one. Raises StoreError if a file of the
    version is not the one that was registered.
    """
    origin, train = inputs.origin, inputs.train
    assert origin.trained and origin.adapter  # of a version
    if origin.base_digest != inputs.base.digest:
        return start_from_scratch(store, train, f"{origin.note} has a different base model")
    if origin.method not in LORA_ARMS:
        why = f"{origin.note} was trained with {origin.method}, and this arm has LoRA layers"
        return start_from_scratch(store, train, why)
    folder, fresh = Path(origin.adapter.folder), store.path(inputs.step0.folder)
    weights = _checked(folder / WEIGHTS, origin.adapter.sha256, origin.note)
    if unlike := differences(_shape(folder), _shape(fresh)):
        return start_from_scratch(store, train, f"{origin.note} has another adapter: {'; '.join(unlike)}")
    known = set(read_ids(_checked(Path(origin.trained.path), origin.trained.sha256, origin.note)))
    if leaked := sum(row in known for file in inputs.held_out for row in ids_of(store.path(file))):
        return start_from_scratch(store, train, f"{origin.note} was trained on {leaked:,} rows that are held out here")
    chosen = choose_rows(ids_of(store.path(train)), known, replay_share)
    made = _publish(store, train, _Adapter(weights, fresh / CONFIG), chosen)
    return Start(
        version=origin.version,
        note=origin.note,
        adapter=adapter_ref(store, made / "adapter"),
        rows=store.ref(made / "train.jsonl"),
        new_rows=len(chosen.new),
        old_rows=len(chosen.old),
        replayed_rows=len(chosen.replayed),
        trained=publish_ids(store, known.union(chosen.new)),
    )


def _shape(adapter_folder: Path) -> AdapterShape:
    from safetensors import safe_open

    with safe_open(adapter_folder / WEIGHTS, "numpy") as file:
        return AdapterShape(json.loads((adapter_folder / CONFIG).read_text()), list(file.keys()))


class _Adapter(NamedTuple):
    """What a start is made of: the version's weights under the arm's own configuration."""

    weights: Path
    config: Path


def _publish(store: Store, train: FileRef, adapter: _Adapter, chosen: ChosenRows) -> Path:
    """The folder in the store that keeps a start: its adapter and the chosen rows."""
    lines = store.path(train).read_text(encoding="utf-8").splitlines(keepends=True)
    taken = {*chosen.new, *chosen.replayed}
    key = content_key(digest(adapter.weights), digest(adapter.config.parent), train.sha256, *sorted(taken))[:32]
    with store.publish("starts", key) as folder:
        (folder / "adapter").mkdir()
        shutil.copyfile(adapter.config, folder / "adapter" / CONFIG)
        shutil.copyfile(adapter.weights, folder / "adapter" / WEIGHTS)
        rows = zip(ids_of(store.path(train)), lines, strict=True)
        text = "".join(line for row, line in rows if row in taken)
        (folder / "train.jsonl").write_text(text, encoding="utf-8")
    return store.files / "starts" / key


_SALT: Final = "tunegate-replay-v1:"
_ALIKE: Final = {
    "peft_type": "kind",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""What two adapters must share, by PEFT's name and by ours. Dropout may differ: it is no part of what was learnt."""


def choose_rows(row_ids: Sequence[str], known: Collection[str], share: float) -> ChosenRows:
    """Every row that is not known, and so many known ones that they make `share` of all; all of them if they are too
    few.

    Replayed are those whose ids have the lowest hash: the same ones each time, whatever else comes. In the given order.
    """
    new = [row for row in row_ids if row not in known]
    old = [row for row in row_ids if row in known]
    wanted = len(old) if share == 1.0 else math.floor(len(new) * share / (1.0 - share) + 0.5)
    lowest = set(sorted(old, key=_hash)[:wanted])
    return ChosenRows(new, old, [row for row in old if row in lowest])


def _hash(row_id: str) -> str:
    return hashlib.sha256(f"{_SALT}{row_id}".encode()).hexdigest()


def differences(theirs: AdapterShape, ours: AdapterShape) -> list[str]:
    """In what an adapter has another shape than a fresh one of an arm; none if it fits."""
    pairs = {name: (theirs.config.get(key), ours.config.get(key)) for key, name in _ALIKE.items()}
    found = [f"{name} {there} there and {here} here" for name, (there, here) in pairs.items() if there != here]
    if layers := theirs.layers ^ ours.layers:
        more = f"such as {min(layers)}"
        found.append(f"{len(theirs.layers)} adapted layers there and {len(ours.layers)} here, not the same ({more})")
    return found
