"""Random accidents in files, for fuzz tests; each draws from a seed that the test names."""

import random
import struct
from typing import Any

JUNK = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("nan"),
    "",
    "x" * 5000,
    "\0",
    "../..",
    [],
    [[[]]],
    {},
    {"a": {"b": []}},
    "\ud800",
]


def mutate_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Flipped bits, cut, repeated, zeroed or shuffled pieces, another header length."""
    data = bytearray(raw or b"\0")
    kind = draw.randrange(7)
    at = draw.randrange(min(len(data), draw.choice([16, 2000, len(data)])))
    if kind == 0:
        for _ in range(draw.choice([1, 1, 8])):
            data[draw.randrange(at, len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + draw.choice([1, 8, 100])]
    elif kind == 3:
        data[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
    elif kind == 4:
        data[:8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**60, 2**64 - 1, len(data), draw.randrange(5000)]))
    elif kind == 5:
        data[at : at + 4] = draw.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\x80\x04\x95."])
    else:
        data[at:at] = data[draw.randrange(len(data)) :][:200]
    return bytes(data)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """Keys and values of an object, at any depth, in place of each other or of junk."""
    if not isinstance(value, dict) or not value or draw.random() < 0.1:
        return draw.choice(JUNK)
    name = draw.choice(list(value))
    kind = draw.randrange(5)
    if kind == 0:
        return {key: item for key, item in value.items() if key != name}
    if kind == 1:
        return {
            (draw.choice(["../x", "x" * 600, "lora_A", ""]) if key == name else key): item
            for key, item in value.items()
        }
    if kind == 2:
        return value | {name: value[draw.choice(list(value))]}
    return value | {name: mutate_json(value[name], draw)}


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to five random accidents."""
    data = bytearray(content)
    for _ in range(draw.randrange(1, 6)):
        place, length = draw.randrange(len(data) + 1), draw.randrange(1, 60)
        accident = draw.randrange(7)
        if accident == 0:
            data[place : place + 1] = bytes([draw.randrange(256)])
        elif accident == 1:
            del data[place : place + length]
        elif accident == 2:
            data[place:place] = data[draw.randrange(len(data) + 1) :][:length]
        elif accident == 3:
            data = data[: max(1, place)]
        elif accident == 4:
            data[place:place] = draw.choice([b"\0", b"\r", b"\xef\xbb\xbf", b'"', b"{", b"[", b"\\u12", b"NaN", b"\n"])
        elif accident == 5:
            data = bytearray(bytes(data).replace(b"\n", b"\r\n"))
        else:
            data[place:place] = "é高".encode(draw.choice(["latin-1", "gb18030", "utf-16"]), "ignore")
        data = data or bytearray(b"x")
    return bytes(data)
