"""A row that is longer than the model may see: left out, truncated or split, in tokens and never silently.

A prompt is cut in its middle, because instructions stand at its ends (LongBench, arXiv 2308.14508, section 4.1), and
with that the chat template's own tokens stay. An answer that is cut loses its stop token, so that no model learns to
stop there.
"""

from typing import Literal

from tasks.models.core.packing import Ids, Scored

TooLong = Literal["leave_out", "truncate", "split"]


def fit(row: Scored, limit: int, policy: TooLong) -> list[Scored]:
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
        return [Scored([*prompt, *answer], len(prompt))]
    return _windows(_without_middle(prompt, max(limit - len(answer), limit // 2)), answer, limit)


def _without_middle(ids: list[int], most: int) -> list[int]:
    if len(ids) <= most:
        return ids
    head = most // 2
    return [*ids[:head], *ids[len(ids) - (most - head) :]]


def _windows(prompt: list[int], answer: Ids, limit: int) -> list[Scored]:
    """The answer in pieces; a later piece has half of its room for the answer that came before it."""
    room = limit - len(prompt)
    windows = [Scored([*prompt, *answer[:room]], len(prompt))]
    overlap = room // 2
    for start in range(room, len(answer), room - overlap):
        context = [*prompt, *answer[start - overlap : start]]
        windows.append(Scored([*context, *answer[start : start + room - overlap]], len(context)))
    return windows
