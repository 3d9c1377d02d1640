"""Training rows as token ids: those that are too long left out or cut, and the first ones checked as the model will see
them."""

import json
from pathlib import Path
from typing import Literal

from data_contracts.errors import DataError, Problem
from tasks.models.core.packing import Ids, ScoredSequence, pack
from tasks.models.workers.chat_template import Chat

_CHECKED_ROWS = 64  # decoded before training starts


TooLong = Literal["leave_out", "truncate", "split"]


def encode_rows(
    chat: Chat, file: Path, max_tokens: int, too_long: TooLong, listed: Path
) -> tuple[list[ScoredSequence], list[str]]:
    """Rows as token ids, and the row id of each; those over `max_tokens` are listed in `listed`, with what was done."""
    rows: list[ScoredSequence] = []
    row_ids: list[str] = []
    whole: list[ScoredSequence] = []
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
            cut = {"tokens": len(scored.ids), "limit": max_tokens, "policy": too_long, "sequences": len(sequences)}
            long_rows.write(json.dumps({**named, **cut}) + "\n")
    if not rows:
        act = "raise train.max_tokens, or set train.too_long to truncate or split"
        raise DataError(Problem("no row is short enough to train on", file.name, f"{max_tokens} tokens", act))
    check_batch(chat, whole[:_CHECKED_ROWS])
    return rows, row_ids


def check_batch(chat: Chat, rows: list[ScoredSequence]) -> None:
    """Decode rows as the model will see them: an answer whose stop token is not learned never ends."""
    for row in rows:
        text = str(chat.tokenizer.decode(pack([row]).targets_N.tolist()))
        if not text.endswith(chat.stops):
            raise DataError(Problem(f"a completion ends without a stop token: ...{text[-20:]!r}", "first rows",
                                    f"one of {list(chat.stops)}", "check the base's chat template"))  # fmt: skip


def fit(row: ScoredSequence, limit: int, policy: TooLong) -> list[ScoredSequence]:
    """The sequences of at most `limit` tokens (16 or more) that stand for a row; none if it is left out.

    truncate: one sequence; the answer gets what it needs up to half of the limit, or more if the prompt needs less.
    split: as many as it takes, each with the prompt (up to half of the limit) and the last of the answer that came
    before as context. Every answer token is scored exactly once.
    """
    if len(row.ids) <= limit:
        return [row]
    if policy == "leave_out":
        return []
    prompt, answer = list(row.ids[: row.start]), list(row.ids[row.start :])
    if policy == "truncate":
        answer = answer[: limit - min(len(prompt), limit // 2)]
        prompt = _without_middle(prompt, limit - len(answer))
        return [ScoredSequence([*prompt, *answer], len(prompt))]
    return _windows(_without_middle(prompt, max(limit - len(answer), limit // 2)), answer, limit)


def _without_middle(ids: list[int], most: int) -> list[int]:
    if len(ids) <= most:
        return ids
    head = most // 2
    return [*ids[:head], *ids[len(ids) - (most - head) :]]


def _windows(prompt: list[int], answer: Ids, limit: int) -> list[ScoredSequence]:
    """The answer in pieces; a later piece has half of its room for the answer that came before it."""
    room = limit - len(prompt)
    windows = [ScoredSequence([*prompt, *answer[:room]], len(prompt))]
    overlap = room // 2
    for start in range(room, len(answer), room - overlap):
        context = [*prompt, *answer[start - overlap : start]]
        windows.append(ScoredSequence([*context, *answer[start : start + room - overlap]], len(context)))
    return windows
