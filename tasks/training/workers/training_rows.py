"""Training rows as token ids, with what becomes of those that are too long, and a look at them as the model will see them."""

import json
from pathlib import Path

from data_contracts.errors import DataError, Problem
from tasks.models.core.packing import Scored, pack
from tasks.models.workers.chat_template import Chat
from tasks.training.workers.too_long import TooLong, fit

_CHECKED_ROWS = 64  # decoded before training starts


def encode_rows(
    chat: Chat, file: Path, max_tokens: int, too_long: TooLong, listed: Path
) -> tuple[list[Scored], list[str]]:
    """Rows as token ids, and the row id of each; those over `max_tokens` are listed in `listed`, with their fate."""
    rows: list[Scored] = []
    row_ids: list[str] = []
    whole: list[Scored] = []
    with file.open() as lines, listed.open("w") as long_rows:
        for line in lines:
            row = json.loads(line)
            scored = chat.scored(row["messages"])
            sequences = fit(scored, max_tokens, too_long)
            rows += sequences
            row_ids += [row["row_id"]] * len(sequences)
            if sequences == [scored]:
                whole.append(scored)
                continue
            named = {key: row[key] for key in ("row_id", "source", "line")}
            told = {"tokens": len(scored.ids), "limit": max_tokens, "policy": too_long, "sequences": len(sequences)}
            long_rows.write(json.dumps({**named, **told}) + "\n")
    if not rows:
        act = "raise train.max_tokens, or set train.too_long to truncate or split"
        raise DataError(Problem("no row is short enough to train on", file.name, f"{max_tokens} tokens", act))
    check_batch(chat, whole[:_CHECKED_ROWS])
    return rows, row_ids


def check_batch(chat: Chat, rows: list[Scored]) -> None:
    """Decode rows as the model will see them: an answer whose stop token is not learned never ends."""
    for row in rows:
        text = str(chat.tokenizer.decode(pack([row]).targets_N.tolist()))
        if not text.endswith(chat.stops):
            raise DataError(Problem(f"a completion ends without a stop token: ...{text[-20:]!r}", "first rows",
                                    f"one of {list(chat.stops)}", "check the base's chat template"))  # fmt: skip
