"""Which dials of training go together: what cannot work, or would be silently without effect, is refused with its reason."""

from collections.abc import Iterator, Mapping
from typing import Any

LORA_ARMS = ("lora", "qlora")
"""Arms that train LoRA layers."""

_READ_BY = {
    "quant_type": ("qlora",),
    "double_quant": ("qlora",),
    "dropout": LORA_ARMS,
    "use_rslora": LORA_ARMS,
    "use_dora": LORA_ARMS,
    "init": LORA_ARMS,
    "lora_plus_ratio": LORA_ARMS,
    "prefix_tokens": ("prefix",),
}

_SORTING = ("galore", "apollo", "lomo", "adalomo")
"""Optimisers of transformers that are made from a model instead of groups of weights."""


def refusals(train: Any) -> Iterator[str]:
    """Every reason why the dials of a TrainSpec do not fit together; none if they do."""
    yield from _unread(train)
    yield from _impossible(train)
    if train.early_stopping_patience is not None and train.validation_steps is None:
        yield "early_stopping_patience counts validations: set validation_steps too"
    if train.warm_start == "never" and train.replay_share != type(train).model_fields["replay_share"].default:
        yield "replay_share is of a warm start's rows: set warm_start to champion, or leave replay_share out"


def unread_by(method: str, dials: Mapping[str, Any]) -> list[str]:
    """The dials that an arm with this method and these dials does not read."""
    found = [dial for dial, arms in _READ_BY.items() if method not in arms]
    return [*found, "replay_share"] if dials["warm_start"] == "never" else found


def _unread(train: Any) -> Iterator[str]:
    """A dial that was turned, and that no arm reads."""
    for dial, arms in _READ_BY.items():
        is_turned = getattr(train, dial) != type(train).model_fields[dial].default
        if is_turned and not set(arms) & set(train.methods):
            yield f"{dial} has an effect on {' and '.join(arms)} only: add one to methods, or leave {dial} out"
    for arm in sorted(set(train.learning_rates) - set(train.methods)):
        yield f"learning_rates has one for {arm}, which is no arm of this run: add it to methods, or leave it out"


def _impossible(train: Any) -> Iterator[str]:
    if len(set(train.methods)) < len(train.methods):
        yield "methods names an arm twice: each is trained once"
    if train.use_dora and train.init != "default":
        yield f"use_dora takes its magnitudes from the untouched base, and init={train.init} starts elsewhere: drop one"
    if train.warm_start != "never" and train.init != "default":
        yield f"warm_start begins with the champion's adapter, and init={train.init} with parts of the base: drop one"
    if train.init == "loftq" and "qlora" not in train.methods:
        yield "init=loftq makes up for what quantisation lost, and no arm is quantised: add qlora to methods"
    if train.lora_plus_ratio is not None and train.optimizer.startswith(_SORTING):
        yield f"{train.optimizer} sorts the weights itself, so LoRA's B cannot get a rate of its own: drop lora_plus_ratio"
    if train.parallel > 1 and train.workers > 1 and train.engine == "local":
        yield "parallel gives each arm one GPU or one share of the cores, and workers takes several: set one of them to 1"
    if train.sharding != "none":
        yield from _undivided(train)
    if "prefix" in train.methods and train.activation_checkpointing:
        yield "prefix hands its keys and values on in a cache, which activation_checkpointing drops: switch it off"


def _undivided(train: Any) -> Iterator[str]:
    """What dividing the weights among workers does not cover."""
    if train.workers == 1:
        yield "sharding divides weights among workers: set workers to 2 or more, or sharding to none"
    if any(word in train.optimizer for word in ("8bit", "paged", "bnb")):
        yield "bitsandbytes' optimisers know no divided weights: set optimizer to adamw_torch, or sharding to none"
    if others := sorted(set(train.methods) - set(LORA_ARMS)):
        yield f"sharding divides the base below LoRA's adapters, and not {' or '.join(others)}: leave out one of the two"
    if train.init != "default" or train.use_dora or train.lora_plus_ratio is not None:
        yield "sharding is for plain LoRA layers: leave out init, use_dora and lora_plus_ratio, or set sharding to none"
