"""Where an arm starts that is to go on from the champion, and which rows it then sees; or why it starts from scratch."""

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from data_contracts.data_reports import FileRef
from data_contracts.errors import ConfigError, Problem, StoreError
from data_contracts.reports import AdapterRef, BaseModelRef, Origin, Start
from data_contracts.run_spec import StoreSpec
from data_contracts.train_spec import LORA_ARMS
from tasks.data.curation.dataset_files import ids_of, publish_ids, read_ids
from tasks.models.base import ADAPTER_FILE, adapter_ref
from tasks.release import registry
from tasks.release.registry import Registered
from tasks.runtime.store import Store, content_key, digest

CONFIG_FILE = "adapter_config.json"


class Form(NamedTuple):
    """An adapter as PEFT's configuration and the names of its tensors tell it."""

    config: Mapping[str, Any]
    tensors: Collection[str]

    @property
    def layers(self) -> set[str]:
        """target_modules can name the same layers in several ways."""
        return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self.tensors}


class Chosen(NamedTuple):
    """Row ids of a warm start."""

    new: list[str]
    old: list[str]
    replayed: list[str]


def origin_of(store: StoreSpec, name: str, train: Path) -> tuple[Origin, list[str]]:
    """The newest version in the champion's line that some training row is new to, and the versions that were passed over.

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
            gone = f"version {found.started_from}, from which it went on, is no longer registered"
            return Origin(note=f"nothing is new to {found.label}, and {gone}"), passed


def _unknown(found: Registered) -> str | None:
    """Why nobody knows which rows a version was trained on; None if it is known."""
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
    """A version as what a warm start goes on from."""
    return Origin(
        note=found.label,
        version=found.version,
        method=found.method,
        base_digest=found.base_digest,
        adapter=found.adapter,
        trained=found.trained,
    )


def scratch(store: Store, train: FileRef, why: str) -> Start:
    """A fresh start on all training rows."""
    count = len(ids_of(store.path(train)))
    return Start(
        version=None, note=why, adapter=None, rows=train, new_rows=count, old_rows=0, replayed_rows=0, trained=None
    )


def choose_start(
    store: Store, origin: Origin, base: BaseModelRef, step0: AdapterRef, train: FileRef, held_out: list[FileRef],
    replay_share: float,
) -> Start:  # fmt: skip
    """Go on from a version's adapter, on the rows that are new to it and a share of the others; or start from scratch.

    step0: the arm's fresh adapter, whose form the version's must have. Raises StoreError if a file of the version is not
    the one that was registered.
    """
    assert origin.trained and origin.adapter  # of a version
    if origin.base_digest != base.digest:
        return scratch(store, train, f"{origin.note} stands on another base")
    if origin.method not in LORA_ARMS:
        return scratch(store, train, f"{origin.note} was trained with {origin.method}, and this arm has LoRA layers")
    folder, fresh = Path(origin.adapter.folder), store.path(step0.folder)
    weights = _checked(folder / ADAPTER_FILE, origin.adapter.sha256, origin.note)
    if unlike := differences(_form(folder), _form(fresh)):
        return scratch(store, train, f"{origin.note} has another adapter: {'; '.join(unlike)}")
    known = set(read_ids(_checked(Path(origin.trained.path), origin.trained.sha256, origin.note)))
    if leaked := sum(row in known for file in held_out for row in ids_of(store.path(file))):
        return scratch(store, train, f"{origin.note} was trained on {leaked:,} rows that are held out here")
    return _publish(store, origin, weights, fresh, train, known, replay_share)


def _form(adapter: Path) -> Form:
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_FILE, "numpy") as file:
        return Form(json.loads((adapter / CONFIG_FILE).read_text()), list(file.keys()))


def _publish(
    store: Store, origin: Origin, weights: Path, fresh: Path, train: FileRef, known: set[str], replay_share: float
) -> Start:
    """Keep the start in the store: the version's weights under the arm's own configuration, and the chosen rows."""
    lines = store.path(train).read_text(encoding="utf-8").splitlines(keepends=True)
    row_ids = ids_of(store.path(train))
    chosen = choose(row_ids, known, replay_share)
    taken = {*chosen.new, *chosen.replayed}
    key = content_key(digest(weights), digest(fresh), train.sha256, *sorted(taken))[:32]
    with store.publish("starts", key) as folder:
        (folder / "adapter").mkdir()
        shutil.copyfile(fresh / CONFIG_FILE, folder / "adapter" / CONFIG_FILE)
        shutil.copyfile(weights, folder / "adapter" / ADAPTER_FILE)
        text = "".join(line for row, line in zip(row_ids, lines, strict=True) if row in taken)
        (folder / "train.jsonl").write_text(text, encoding="utf-8")
    made = store.files / "starts" / key
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


_SALT: Final = "tunegate-replay-v1:"
_ALIKE: Final = {
    "peft_type": "kind",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""What two adapters must share, as PEFT calls it and as people do. Dropout may differ: it is no part of what was learnt."""


def choose(row_ids: Sequence[str], known: Collection[str], share: float) -> Chosen:
    """Every row that is not known, and so many known ones that they make `share` of all; all of them if they are too few.

    Replayed are those whose ids have the lowest hash: the same ones each time, whatever else comes. In the given order.
    """
    new = [row for row in row_ids if row not in known]
    old = [row for row in row_ids if row in known]
    wanted = len(old) if share == 1.0 else math.floor(len(new) * share / (1.0 - share) + 0.5)
    lowest = set(sorted(old, key=_hash)[:wanted])
    return Chosen(new, old, [row for row in old if row in lowest])


def _hash(row_id: str) -> str:
    return hashlib.sha256(f"{_SALT}{row_id}".encode()).hexdigest()


def differences(theirs: Form, ours: Form) -> list[str]:
    """In what an adapter is of another form than a fresh one of an arm; none if it fits."""
    pairs = {name: (theirs.config.get(key), ours.config.get(key)) for key, name in _ALIKE.items()}
    found = [f"{name} {there} there and {here} here" for name, (there, here) in pairs.items() if there != here]
    if layers := theirs.layers ^ ours.layers:
        more = f"such as {min(layers)}"
        found.append(f"{len(theirs.layers)} adapted layers there and {len(ours.layers)} here, not the same ({more})")
    return found
