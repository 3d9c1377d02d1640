"""One answer while it is written: transformers' own serving thread and streamer, up to a stop token or a stop string."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import GenerateManager

from data_contracts.errors import Problem, WorkerError

if TYPE_CHECKING:
    from tasks.serving.workers.loaded_model import LoadedModel


@dataclass(frozen=True)
class GenerationRequest:
    """How an answer is written. temperature 0: the likeliest token each time, as versions are evaluated."""

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Answer:
    """Starts when it is made.

    transformers' GenerateManager, which has no public counterpart, keeps one thread on which all models run, streams tokens
    from it and cancels a request between two of them. It calls `generate` of the model it gets. It gets this object instead,
    whose `generate` switches the version's adapter on, on that thread and just before writing: between two requests another
    version may have answered on the same base. transformers is pinned below the next major version for this.
    """

    def __init__(self, loaded: "LoadedModel", request: GenerationRequest, manager: GenerateManager) -> None:
        self.loaded, self.request = loaded, request
        self.is_whole = False  # it ended with a stop token or a stop string
        self.was_cut = False
        self.seconds = 0.0
        self._loop, self._written = asyncio.get_running_loop(), asyncio.Event()
        ids = torch.tensor([request.prompt], device=loaded.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model: Any = self
        self._pieces, self._streamer = manager.generate_streaming(model, loaded.tokenizer, inputs, self._config(), "")

    def _config(self) -> GenerationConfig:
        request = self.request
        config: GenerationConfig = copy.deepcopy(self.loaded.model.generation_config)
        config.max_new_tokens, config.max_length = request.max_tokens, None
        config.do_sample = request.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = request.temperature, request.top_p or config.top_p
        config.eos_token_id, config.pad_token_id = self.loaded.stops, self.loaded.stops[0]
        return config

    def generate(self, **options: Any) -> None:
        """Runs on the one thread that touches models. options: what a model's own `generate` takes."""
        started = time.monotonic()
        try:
            if self.request.seed is not None:
                torch.manual_seed(self.request.seed)
            with self.loaded.active() as model:
                written = model.generate(**options)
            self.is_whole = int(written[0, -1]) in self.loaded.stops
        finally:
            self.seconds = time.monotonic() - started
            self._loop.call_soon_threadsafe(self._written.set)

    @property
    def tokens(self) -> int:
        """Written so far, the stop token too."""
        return int(self._streamer.total_tokens)

    @property
    def is_written(self) -> bool:
        return self._written.is_set()

    def cancel(self) -> None:
        """Write no further: another client waits, or none does."""
        self.was_cut = not self.is_written
        self._streamer.cancel()

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it grows. A reader that stops reading ends the writing."""
        trimmer = StopStringTrimmer(self.request.stop)
        try:
            while (piece := await self._pieces.get()) is not None:
                if not isinstance(piece, str):
                    raise WorkerError(Problem(piece.msg, self.loaded.label))
                yield trimmer.feed(piece)
                if trimmer.found:
                    self._streamer.cancel()
                    break
            yield trimmer.rest()
            await self._written.wait()
            self.is_whole = self.is_whole or trimmer.found
        finally:
            self._streamer.cancel()

    async def text(self) -> str:
        return "".join([piece async for piece in self.pieces()])


class StopStringTrimmer:
    """Ends a stream of text before the first stop string. What may be the beginning of one is held back until it is clear."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def feed(self, piece: str) -> str:
        """What can be passed on now; nothing any more once a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        # The stop string that is complete first ends the text, however it was cut into pieces.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        partial = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        keep = len(text) - max(partial, default=0)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """What was held back and was no stop string, at the end of the text."""
        return self._held
