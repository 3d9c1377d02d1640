"""Adapters and weights on the disk, checked before a library reads them: names, links, headers, numbers.

Nothing here is read before its size is known to be what its header says, and no header before it is known to be short.
"""

import json
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from tasks.models.core.adapter_scan import FLOATS, Header, Layers, Tensor, config_faults, index_faults, tensor_faults

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"
INDEX: Final = "model.safetensors.index.json"
_MOST_JSON_BYTES: Final = 32 * 1024**2
_MOST_HEADER_BYTES: Final = 32 * 1024**2
_MOST_FAULTS: Final = 12
_CHUNK: Final = 1 << 22  # numbers checked together
# Of all floats an exponent of ones says infinity or NaN.
_EXPONENTS: Final = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


def scan_adapter(folder: Path, layers: Layers | None = None) -> list[str]:
    """Everything that is wrong with a LoRA or prefix adapter, `file: fault`; nothing: it may be loaded.

    layers: of its base, if that is at hand.
    """
    allowed = (CONFIG, WEIGHTS, "README.md")
    faults = [*_folder_faults(folder, lambda name: name in allowed), *_missing(folder, CONFIG, WEIGHTS)]
    if faults:
        return _few(faults)
    try:
        config = read_bounded_json(folder / CONFIG)
        faults += [f"{CONFIG}: {fault}" for fault in config_faults(config)]
        header = read_header(folder / WEIGHTS)
    except ValueError as error:
        return _few([*faults, str(error)])
    if not faults:
        faults += [f"{WEIGHTS}: {fault}" for fault in tensor_faults(config, header, layers)]
    return _few(faults or _not_finite(folder / WEIGHTS, header))


def scan_weights(folder: Path) -> list[str]:
    """The same of a model with all its weights, as training saves it: configuration, weights in one file or several."""

    def is_ours(name: str) -> bool:
        return name.endswith(".safetensors") or name in ("config.json", "generation_config.json", INDEX)

    faults = [*_folder_faults(folder, is_ours), *_missing(folder, "config.json"), *weight_faults(folder, FLOATS)]
    files = sorted(folder.glob("*.safetensors"))
    return _few(faults or [fault for file in files for fault in _not_finite(file, read_header(file))])


def weight_faults(folder: Path, dtypes: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a folder's safetensors files and their index, whatever other files are there. dtypes: none
    means any."""
    faults: list[str] = []
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        faults.append("it holds no .safetensors weights")
    if (folder / INDEX).exists():
        faults += _named(INDEX, lambda: index_faults(read_bounded_json(folder / INDEX), [file.name for file in files]))
    for file in files:
        faults += _named(file.name, partial(_other_types, file, dtypes))
    return _few(faults)


def _named(name: str, check: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return [f"{name}: {fault}" for fault in check()]
    except ValueError as error:
        return [str(error)]


def _other_types(file: Path, dtypes: tuple[str, ...]) -> Iterator[str]:
    for name, tensor in read_header(file).items():
        if dtypes and tensor.dtype not in dtypes:
            yield f"{name!a} is of type {tensor.dtype}, not {', '.join(dtypes)}"


def _folder_faults(folder: Path, is_allowed: Callable[[str], bool]) -> Iterator[str]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no plain file"
            yield f"{path.name!a} is {kind}"
        elif not is_allowed(path.name):
            yield f"{path.name!a} does not belong there: only JSON and safetensors are read"


def _missing(folder: Path, *names: str) -> list[str]:
    return [f"{name} is missing" for name in names if not (folder / name).exists()]


def read_bounded_json(file: Path) -> Any:
    """Raises ValueError, with the file's name, for what is no JSON."""
    if (size := file.stat().st_size) > _MOST_JSON_BYTES:
        raise ValueError(f"{file.name}: {size:,} bytes, more than {_MOST_JSON_BYTES:,}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name}: is no JSON: {str(error)[:120]}") from error


def read_header(file: Path) -> Header:
    """Every tensor's type and shape. Raises ValueError, with the file's name, for what is not a complete safetensors file."""
    length, size = _header_bytes(file), file.stat().st_size
    if length > min(size - 8, _MOST_HEADER_BYTES):
        found = f"its header would have {length:,} bytes, the file has {size:,}" if size >= 8 else f"{size} bytes"
        raise ValueError(f"{file.name}: is not a complete safetensors file: {found}")
    try:
        with safe_open(file, framework="numpy") as stored:
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 it is no mapping
            return {name: Tensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file.name}: is not a complete safetensors file: {str(error)[:200]}") from error


def _header_bytes(file: Path) -> int:
    with file.open("rb") as stored:
        return int.from_bytes(stored.read(8), "little")


def _not_finite(file: Path, header: Header) -> list[str]:
    """The tensors with a number that is none. safetensors has no bf16 without torch, so the bits are checked."""
    start = 8 + (length := _header_bytes(file))
    with file.open("rb") as stored:
        stored.seek(8)
        places = json.loads(stored.read(length))
    data = np.memmap(file, np.uint8, "r", start) if file.stat().st_size > start else np.empty(0, np.uint8)
    wrong = [name for name, tensor in header.items() if not _is_finite(data, places[name], tensor)]
    return [f"{file.name}: {name} holds NaN or infinity" for name in wrong]


def _is_finite(data: Any, place: dict[str, Any], tensor: Tensor) -> bool:
    kind, exponent = _EXPONENTS[tensor.dtype]
    first, last = place["data_offsets"]
    bits = data[first:last].view(kind)
    return not any(((bits[at : at + _CHUNK] & exponent) == exponent).any() for at in range(0, len(bits), _CHUNK))


def _few(faults: list[str]) -> list[str]:
    """The first faults, printable whatever a library has put into its words."""
    shown = ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in fault) for fault in faults[:_MOST_FAULTS]]
    rest = len(faults) - _MOST_FAULTS
    return [*shown, f"and {rest:,} faults more"] if rest > 0 else shown
