"""One part of the checked rows as numbers: what curation compares, a few hundred bytes a row instead of its text."""

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from data_contracts.rows import Conversation, conversation_from_json
from tasks.data.curation.core.minhash import signatures
from tasks.data.curation.core.shingles import Hashes, Offsets, batches, shingle_hashes, to_offsets, word_hashes
from tasks.data.validation.core.row_hashes import answer_hash, content_hash, prompt_hash

_HASHES: Final = {"content_hash": content_hash, "answer_hash": answer_hash, "prompt_hash": prompt_hash}


class Shingling(NamedTuple):
    """words: in one shingle. threshold: the Jaccard similarity that the bands are made for."""

    words: int
    threshold: float


class SignPart(NamedTuple):
    """One part to sign: the path of its kept.parquet."""

    part: Path
    shingling: Shingling


def sign_part(work: SignPart, out: Path) -> None:
    """Write the numbers of one part to `out`."""
    conversations = [conversation_from_json(text) for text in pq.read_table(work.part)["messages"].to_pylist()]
    sign(conversations, work.shingling, out)


def sign(conversations: list[Conversation], shingling: Shingling, out: Path) -> None:
    """Shingles of whole texts and of answers, band keys, hashes, and how many words an answer has."""
    texts = [" ".join(message.content for message in messages) for messages in conversations]
    answers = [messages[-1].content for messages in conversations]
    flat, offsets = shingle_hashes(texts, shingling.words)
    np.save(out / "text.npy", flat)
    np.save(out / "text_offsets.npy", offsets)
    np.save(out / "bands.npy", signatures(flat, offsets, shingling.threshold))
    flat, offsets = shingle_hashes(answers, shingling.words)
    np.save(out / "answer.npy", flat)
    np.save(out / "answer_offsets.npy", offsets)
    for name, function in _HASHES.items():
        np.save(out / f"{name}.npy", np.array([function(messages) for messages in conversations], np.int64))
    counts = [np.diff(word_hashes(batch)[1]) for batch in batches(answers)]
    np.save(out / "answer_words.npy", np.concatenate(counts) if counts else np.zeros(0, np.int64))


class Signatures:
    """The numbers of all parts, one after the other; shingles are read from disk only for the rows asked for."""

    def __init__(self, folders: list[Path]) -> None:
        self.bands, self.content_hashes, self.answer_hashes, self.prompt_hashes, self.answer_words = (
            np.concatenate([np.load(folder / f"{name}.npy") for folder in folders])
            for name in ("bands", *_HASHES, "answer_words")
        )
        self._folders = folders
        self._starts = to_offsets(
            np.array([len(np.load(folder / "prompt_hash.npy", "r")) for folder in folders], np.int64)
        )

    def text_shingles(self, rows: Offsets) -> tuple[Hashes, Offsets]:
        """Shingles of the whole texts of some rows, flat, and offsets."""
        return self._shingles("text", rows)

    def answer_shingles(self, rows: Offsets) -> tuple[Hashes, Offsets]:
        """Shingles of the answers of some rows, flat, and offsets."""
        return self._shingles("answer", rows)

    def _shingles(self, name: str, rows: Offsets) -> tuple[Hashes, Offsets]:
        pieces: list[Hashes] = [np.zeros(0, np.uint64)] * len(rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(parts):
            flat = np.load(self._folders[part] / f"{name}.npy", "r")
            offsets = np.load(self._folders[part] / f"{name}_offsets.npy")
            for place in np.flatnonzero(parts == part).tolist():
                row = int(rows[place] - self._starts[part])
                pieces[place] = flat[offsets[row] : offsets[row + 1]]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        return np.concatenate([np.zeros(0, np.uint64), *pieces]), to_offsets(lengths)
