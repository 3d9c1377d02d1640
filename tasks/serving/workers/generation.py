"""One answer while it is written: transformers' own serving thread and streamer, up to a stop token or a stop string."""

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.cli.serving.utils import GenerateManager

from data_contracts.errors import Problem, WorkerError

if TYPE_CHECKING:
    from tasks.serving.workers.loaded_model import Voice
from collections.abc import Sequence


@dataclass(frozen=True)
class Wish:
    """How an answer is to be written. temperature 0: the likeliest token each time, as versions are evaluated."""

    prompt: list[int]
    most_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Answer:
    """Begun when it is made. Its `generate` stands where transformers' manager expects a model's."""

    def __init__(self, voice: "Voice", wish: Wish, manager: GenerateManager) -> None:
        self.voice, self.wish = voice, wish
        self.is_whole = False  # ended by itself: a stop token or a stop string
        self.was_cut = False
        self.seconds = 0.0
        self._loop, self._written = asyncio.get_running_loop(), asyncio.Event()
        ids = torch.tensor([wish.prompt], device=voice.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model: Any = self
        self._pieces, self._streamer = manager.generate_streaming(model, voice.tokenizer, inputs, self._config(), "")

    def _config(self) -> GenerationConfig:
        wish = self.wish
        config: GenerationConfig = copy.deepcopy(self.voice.model.generation_config)
        config.max_new_tokens, config.max_length = wish.most_tokens, None
        config.do_sample = wish.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = wish.temperature, wish.top_p or config.top_p
        config.eos_token_id, config.pad_token_id = self.voice.stops, self.voice.stops[0]
        return config

    def generate(self, **asked: Any) -> None:
        """Runs on the one thread that touches models."""
        started = time.monotonic()
        try:
            if self.wish.seed is not None:
                torch.manual_seed(self.wish.seed)
            with self.voice.speaking() as model:
                written = model.generate(**asked)
            self.is_whole = int(written[0, -1]) in self.voice.stops
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
        """Write no further: somebody else waits, or nobody does."""
        self.was_cut = not self.is_written
        self._streamer.cancel()

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it grows. Whoever stops reading ends the writing."""
        cutter = Cutter(self.wish.stop)
        try:
            while (piece := await self._pieces.get()) is not None:
                if not isinstance(piece, str):
                    raise WorkerError(Problem(piece.msg, self.voice.label))
                yield cutter.feed(piece)
                if cutter.found:
                    self._streamer.cancel()
                    break
            yield cutter.rest()
            await self._written.wait()
            self.is_whole = self.is_whole or cutter.found
        finally:
            self._streamer.cancel()

    async def text(self) -> str:
        return "".join([piece async for piece in self.pieces()])


class Cutter:
    """What may be the beginning of a stop string is held back until the next piece says."""

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
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        keep = len(text) - max(begun, default=0)
        self._held = text[keep:]
        return text[:keep]

    def rest(self) -> str:
        """What was held back in vain, at the end of the text."""
        return self._held
