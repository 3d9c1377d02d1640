"""Answers as a model writes them: greedily, many at a time, up to its own stop token."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tasks.models.workers.chat_template import Chat

# A step of a quantised base costs its whole dequantisation, whatever the rows; the prompts' activations bound them.
_MOST_ROWS = 16
_MOST_PROMPT_TOKENS = 8192


@dataclass(frozen=True)
class Written:
    """stopped: the model wrote a stop token itself, which is not part of the text."""

    text: str
    stopped: bool
    ms_per_token: float  # of the whole batch's time; the stop token counts


def write_all(model: Any, chat: Chat, prompts: Sequence[str], most_tokens: int) -> Iterator[dict[int, Written]]:
    """Batch after batch, the answer to each prompt by its place. Longest first: memory runs out at once or never."""
    ids = [chat.encode(prompt) for prompt in prompts]
    waiting = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    while waiting:
        rows = max(1, min(_MOST_ROWS, _MOST_PROMPT_TOKENS // len(ids[waiting[0]])))
        batch, waiting = waiting[:rows], waiting[rows:]
        yield dict(zip(batch, write_batch(model, chat, [ids[place] for place in batch], most_tokens), strict=True))


@torch.inference_mode()
def write_batch(model: Any, chat: Chat, prompts: Sequence[Sequence[int]], most_tokens: int) -> list[Written]:
    """The answers to a batch of prompts, which are padded on the left: each as it is written alone."""
    longest = max(map(len, prompts))
    stops = chat.stop_ids
    ids = torch.full((len(prompts), longest), stops[0])
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    started = time.monotonic()
    written = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most_tokens,
        do_sample=False, eos_token_id=stops, pad_token_id=stops[0], use_cache=True,
    )[:, longest:].tolist()  # fmt: skip
    ms_per_token = (time.monotonic() - started) * 1000 / len(written[0])
    return [_until_stop(row, chat, ms_per_token) for row in written]


@torch.inference_mode()
def next_log_probabilities(model: Any, prompt: Sequence[int], pad: int) -> torch.Tensor:
    """Log-probability in nats of every token as the one after the prompt. Through `generate`, which every kind of
    adapter has, and which keeps the logits of one place only."""
    ids = torch.tensor([list(prompt)], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=pad,
        output_logits=True, return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    nats: torch.Tensor = found.logits[0][0].float().log_softmax(-1).cpu()
    return nats


def likeliest(nats_V: torch.Tensor, count: int = 20) -> list[tuple[int, float]] | None:
    """(token id, log-probability) of the likeliest tokens; None if one of them is not finite."""
    found = nats_V.topk(min(count, len(nats_V)))
    if not found.values.isfinite().all():
        return None
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))


def _until_stop(row: list[int], chat: Chat, ms_per_token: float) -> Written:
    """After its stop token a row holds padding."""
    stops = set(chat.stop_ids)
    end = next((place for place, token in enumerate(row) if token in stops), None)
    return Written(chat.read(row[:end]), end is not None, ms_per_token)
