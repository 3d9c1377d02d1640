"""An lm-eval model that scores requests as packed prefix trees: what requests share is computed once.

Same log-probabilities as lm-eval's HFLM; every lm-eval task runs through it.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from tasks.models.core.packing import ScoredSequence, Way, group_for_packing
from tasks.models.workers.chat_template import Chat
from tasks.models.workers.generation import Written, write_all
from tasks.models.workers.scoring import scored_logits, to_device, to_tensors
from tasks.runtime.workers.harness import say

_ROWS = 64  # of logits at a time: log-probabilities of all at once would double the memory
Request = tuple[tuple[str, str], list[int], list[int]]


class PackedLM(HFLM):
    """HFLM with its own `_loglikelihood_tokens`. batch_tokens: most tokens in one forward pass."""

    def __init__(self, model: Any, chat: Chat, batch_tokens: int, max_length: int, name: str, way: Way) -> None:
        super().__init__(pretrained=model, tokenizer=chat.tokenizer, max_length=max_length, batch_size=8)
        self.chat, self.batch_tokens, self.name, self.way = chat, batch_tokens, name, way
        # Where an answer begins: behind this text, prompt and completion are encoded apart, as in training.
        empty = chat.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
        self.answer_header = chat.prompt([{"role": "user", "content": ""}])[len(str(empty)) :]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.answer_header and context.endswith(self.answer_header):
            return self.chat.encode(context), self.chat.encode(continuation)
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return context_ids, continuation_ids

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Answers as text; as Written where a request names no text that ends it (`until: []`), so that the model ends it."""
        own = [place for place, request in enumerate(requests) if request.args[1]["until"] == []]
        others = [place for place in range(len(requests)) if place not in set(own)]
        answers: dict[int, Any] = {}
        for limit, group in groupby(own, lambda place: requests[place].args[1]["max_gen_toks"]):
            answers |= self._write(list(group), [request.args[0] for request in requests], limit)
        if others:
            texts = super().generate_until([requests[place] for place in others], disable_tqdm=True)
            answers |= dict(zip(others, texts, strict=True))
        return [answers[place] for place in range(len(requests))]

    def _write(self, places: list[int], prompts: list[str], most_tokens: int) -> dict[int, Written]:
        answers: dict[int, Written] = {}
        what = f"answers of {self.name}"
        say("progress", what=what, done=0, of=len(places))
        for batch in write_all(self.model, self.chat, [prompts[place] for place in places], most_tokens):
            answers |= {places[index]: written for index, written in batch.items()}
            say("progress", what=what, done=len(answers), of=len(places))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding would write it) for each request.

        A request longer than the model's context loses its leftmost tokens, as in HFLM, which also scores a model that
        cannot be packed.
        """
        if self.way == "padded":
            scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
            return scores
        # The same question may be asked by several tasks: it is scored once.
        keys = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        unique = list(dict.fromkeys(keys))
        sequences = [self._fit(context, continuation) for context, continuation in unique]
        answers: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, bool]] = {}
        for group in group_for_packing(sequences, self.batch_tokens):
            for index, answer in zip(group, self._score([sequences[i] for i in group]), strict=True):
                answers[unique[index]] = answer
            say("progress", what=f"scoring {self.name}", done=len(answers), of=len(unique))
        return [answers[key] for key in keys]

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> ScoredSequence:
        ids = [*context, *continuation][-(self.max_length + 1) :]
        return ScoredSequence(ids, max(1, len(ids) - len(continuation)))

    @torch.inference_mode()
    def _score(self, sequences: list[ScoredSequence]) -> list[tuple[float, bool]]:
        batch = to_device(to_tensors(sequences), self.device)
        logits, labels = scored_logits(self.model, batch), batch["labels"]
        parts = [_chosen(*part) for part in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True)]
        chosen, greedy = (torch.cat(pieces).cpu() for pieces in zip(*parts, strict=True))
        lengths = [len(sequence.ids) - sequence.start for sequence in sequences]
        pieces = zip(chosen.split(lengths), greedy.split(lengths), strict=True)
        return [(float(scores.sum()), bool(right.all())) for scores, right in pieces]


def _chosen(logits_RV: torch.Tensor, labels_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and whether it is the likeliest token."""
    log_probabilities = torch.log_softmax(logits_RV, dim=-1)
    return log_probabilities.gather(1, labels_R[:, None])[:, 0], log_probabilities.argmax(dim=-1) == labels_R
