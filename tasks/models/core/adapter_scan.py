"""What an adapter may be, by its configuration and the header of its weights: checked before anything of it is loaded.

PEFT draws what is missing at random, ignores what it does not know, and acts on settings that import modules or change
the base: all of that is refused here. Pure: files are read by adapter_files.py.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

LORA: Final = "LORA"
PREFIX_TUNING: Final = "PREFIX_TUNING"
FLOATS: Final = ("F32", "BF16", "F16")
MOST_TENSORS: Final = 100_000
_MOST_WIDTH: Final = 2**24  # of a prefix
_MOST_CHARS: Final = 512
_PREFIX_TENSOR: Final = "prompt_embeddings"
_EMBEDDINGS: Final = ("embed_tokens", "lm_head")  # PEFT saves their own weights next to an adapter on one of them
_EMBEDDED: Final = ("lora_embedding_A", "lora_embedding_B")
_OWN_WEIGHTS: Final = ("weight", "base_layer.weight")
_NAME: Final = re.compile(
    r"base_model\.model\.(?P<layer>[\w.]+?)\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector|(?:base_layer\.)?weight)"
)


class Tensor(NamedTuple):
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]


Header = Mapping[str, Tensor]
Layers = Mapping[str, tuple[int, int]]
"""The base's layers that may get an adapter: inputs and outputs by name."""


class SettingRule(NamedTuple):
    """What a setting must be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def _one_of(*values: Any) -> SettingRule:
    return SettingRule(
        lambda value: value in values and type(value) in map(type, values), " or ".join(map(repr, values))
    )


def _count(most: int) -> SettingRule:
    return SettingRule(lambda value: type(value) is int and 1 <= value <= most, f"a whole number from 1 to {most:,}")


def _or_null(rule: SettingRule) -> SettingRule:
    return SettingRule(lambda value: value is None or rule.holds(value), f"{rule.words}, or null")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    listed = [value] if isinstance(value, str) else value
    return isinstance(listed, list) and all(isinstance(name, str) and 0 < len(name) <= _MOST_CHARS for name in listed)


_FLAG: Final = SettingRule(lambda value: type(value) is bool, "true or false")
_TEXT: Final = SettingRule(
    lambda value: value is None or (isinstance(value, str) and len(value) <= _MOST_CHARS), "a short text or null"
)
_COMMON: Final = {
    "peft_type": _TEXT,
    "task_type": _one_of("CAUSAL_LM"),
    "base_model_name_or_path": _TEXT,  # shown to people: what is loaded is the base of the run or the version
    "revision": _TEXT,
    "peft_version": _TEXT,
    "inference_mode": _FLAG,
}
_SETTINGS: Final[dict[str, dict[str, SettingRule]]] = {
    LORA: _COMMON
    | {
        "r": _count(2**16),
        "lora_alpha": SettingRule(lambda value: _number(value) and value > 0, "a finite number above 0"),
        "lora_dropout": SettingRule(lambda value: _number(value) and 0 <= value < 1, "a number from 0 to below 1"),
        "target_modules": SettingRule(_is_names, "names of layers"),
        "use_rslora": _FLAG,
        "use_dora": _FLAG,
        "fan_in_fan_out": _FLAG,
        "bias": _one_of("none"),
        "init_lora_weights": _FLAG,  # a start's name would change the base as the adapter is loaded
        "megatron_core": _one_of("megatron.core"),  # imported as soon as there is a megatron_config
        "qalora_group_size": _count(_MOST_WIDTH),
    },
    PREFIX_TUNING: _COMMON
    | {name: _count(_MOST_WIDTH) for name in ("num_virtual_tokens", "num_layers", "token_dim")}
    | {
        name: _or_null(_count(_MOST_WIDTH))
        for name in ("num_attention_heads", "num_transformer_submodules", "encoder_hidden_size")
    },
}
_NEEDED: Final = {
    LORA: ("r", "lora_alpha", "target_modules"),
    PREFIX_TUNING: ("num_virtual_tokens", "num_layers", "token_dim"),
}


def config_faults(config: Any) -> Iterator[str]:
    """What is wrong with adapter_config.json. A setting that is not listed above must be off: null, false, none or
    empty."""
    if not isinstance(config, dict):
        yield f"is a JSON {type(config).__name__}, not an object"
        return
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _SETTINGS:
        yield f"peft_type is {_shown(kind)}, not {' or '.join(_SETTINGS)}"
        return
    for name in _NEEDED[kind]:
        if name not in config:
            yield f"{name} is missing"
    for name, value in config.items():
        rule = _SETTINGS[kind].get(name)
        is_off = value is None or value is False or value in ({}, [], "")
        if rule is None and not is_off:
            yield f"{_shown(name)} is {_shown(value)}: a setting that is not known must be off"
        elif rule and not rule.holds(value):
            yield f"{name} is {_shown(value)}, not {rule.words}"


def tensor_faults(config: Mapping[str, Any], header: Header, layers: Layers | None) -> Iterator[str]:
    """What is wrong with the tensors of an adapter whose configuration is sound.

    layers: of the base; None where it is not at hand: the tensors must then only fit each other.
    """
    if len(header) > MOST_TENSORS:
        yield f"{len(header):,} tensors, more than {MOST_TENSORS:,}"
        return
    for name, tensor in header.items():
        if tensor.dtype not in FLOATS:
            yield f"{_shown(name)} is of type {_shown(tensor.dtype)}, not {', '.join(FLOATS)}"
    if config["peft_type"] == PREFIX_TUNING:
        yield from _prefix_faults(config, header)
    else:
        yield from _lora_faults(config, header, layers)


def _prefix_faults(config: Mapping[str, Any], header: Header) -> Iterator[str]:
    """A key and a value of every layer for each virtual token."""
    wanted = (config["num_virtual_tokens"], config["num_layers"] * 2 * config["token_dim"])
    for name in sorted({_PREFIX_TENSOR} ^ header.keys()):
        yield f"{_shown(name)} is missing" if name == _PREFIX_TENSOR else f"{_shown(name)} is no part of a prefix"
    if _PREFIX_TENSOR in header and header[_PREFIX_TENSOR].shape != wanted:
        yield f"{_PREFIX_TENSOR} is {_size(header[_PREFIX_TENSOR].shape)}, not {_size(wanted)}"


def _lora_faults(config: Mapping[str, Any], header: Header, layers: Layers | None) -> Iterator[str]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in header.items():
        match = _NAME.fullmatch(name) if len(name) <= _MOST_CHARS else None
        if match is None or (match["part"] in _OWN_WEIGHTS and not match["layer"].endswith(_EMBEDDINGS)):
            yield f"{_shown(name)} is no part of a LoRA adapter"
        else:
            found.setdefault(match["layer"], {})[match["part"]] = tensor.shape
    if not found:
        yield "it holds no LoRA tensor"
    for layer, parts in found.items():
        yield from _layer_faults(layer, parts, config, layers)
    if layers is not None and isinstance(config["target_modules"], list):
        for layer in sorted(_targets(config["target_modules"], layers) - found.keys()):
            yield f"{layer} is a target without tensors: PEFT would draw them at random"


def _layer_faults(
    layer: str, parts: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], layers: Layers | None
) -> Iterator[str]:
    if layers is not None and layer not in layers:
        yield f"{_shown(layer)} is no layer of the base"
        return
    down, up = _EMBEDDED if _EMBEDDED[0] in parts else ("lora_A.weight", "lora_B.weight")
    own = {part for part in parts if part in _OWN_WEIGHTS}
    wanted = {down, up} | ({"lora_magnitude_vector"} if config.get("use_dora") else set())
    if strange := wanted ^ (parts.keys() - own):
        yield f"{layer}: {', '.join(sorted(strange))} missing, or not wanted by its configuration"
        return
    inputs, outputs = layers[layer] if layers is not None else _sides(parts[down], parts[up])
    shapes = {down: (config["r"], inputs), up: (outputs, config["r"]), "lora_magnitude_vector": (outputs,)}
    for part in sorted(wanted):
        if parts[part] != shapes[part]:
            yield f"{layer}.{part} is {_size(parts[part])}, not {_size(shapes[part])}"
    for part in own:
        if sorted(parts[part]) != sorted((inputs, outputs)):
            yield f"{layer}.{part} is {_size(parts[part])}, not {_size((outputs, inputs))}"


def _sides(down: tuple[int, ...], up: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs as the tensors themselves have them."""
    return (down[-1] if down else 0), (up[0] if up else 0)


def _targets(names: Collection[str], layers: Layers) -> set[str]:
    """The layers that PEFT would give an adapter: named so, or ending so."""
    endings = tuple(f".{name}" for name in names)
    return {layer for layer in layers if f".{layer}".endswith(endings)}


def index_faults(index: Any, files: Collection[str]) -> Iterator[str]:
    """What is wrong with the index of weights in several files; `files` are those of its folder.

    transformers joins the names to the folder's path and reads what it finds there.
    """
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        yield "names no files: it has no weight_map"
        return
    listed = [name if isinstance(name, str) else repr(name) for name in named.values()]
    for name in sorted(set(listed) - set(files)):
        yield f"names {_shown(name)}, which is no file of its folder"


def _size(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _shown(value: Any) -> str:
    """A value of an untrusted file: printable and short."""
    if isinstance(value, dict | list):
        return f"a JSON {type(value).__name__} of {len(value):,}"
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 80 else f"{text[:77]}...")[1:-1] or "empty"
