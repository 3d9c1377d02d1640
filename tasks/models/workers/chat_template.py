"""Conversations to text and tokens, the same way for training, evaluation and serving."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from data_contracts.errors import ConfigError, Problem
from tasks.models.core.packing import ScoredSequence

# For bases that come without a chat template: plain role headings, each message closed by the model's end token.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the tokens that end an answer."""

    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...]

    @property
    def stop_ids(self) -> list[int]:
        ids = [self.tokenizer.convert_tokens_to_ids(stop) for stop in self.stops]
        return [int(token) for token in ids if isinstance(token, int)]

    def prompt(self, messages: list[dict[str, str]]) -> str:
        """The conversation so far as the model reads it, up to where its answer begins."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    def split(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """(prompt, completion) of a row; the completion ends with the stop token and holds nothing after it.

        Raises ConfigError if the template rewrites the prompt once the answer is there, or ends no answer.
        """
        prompt = self.prompt(messages[:-1])
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        if not whole.startswith(prompt):
            raise _template_error("the prompt it renders is not the beginning of the whole conversation")
        completion = whole[len(prompt) :]
        end, stop = max((completion.rfind(stop), stop) for stop in self.stops)
        if end < 0:
            raise _template_error(f"it ends an answer with none of the stop tokens {list(self.stops)}")
        return prompt, completion[: end + len(stop)]

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens are in the text, none is added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def read(self, ids: list[int]) -> str:
        """The text of an answer's tokens, without special ones and without white space around it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def scored(self, messages: list[dict[str, str]]) -> ScoredSequence:
        """The row's tokens with its completion to be scored. Prompt and completion are encoded apart, as in serving."""
        return self.sequence(*self.split(messages))

    def sequence(self, prompt: str, completion: str) -> ScoredSequence:
        """Tokens of both, encoded apart."""
        prompt_ids = self.encode(prompt)
        return ScoredSequence(ids=[*prompt_ids, *self.encode(completion)], start=len(prompt_ids))


def load_chat(base: Path) -> Chat:
    """The tokenizer of a base with its stop tokens; no code from the base is run."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return Chat(tokenizer, _stops(base, tokenizer))


def _stops(base: Path, tokenizer: Any) -> tuple[str, ...]:
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (base / "generation_config.json").exists():
        ends = GenerationConfig.from_pretrained(base).eos_token_id
        ids |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if not ids:
        raise ConfigError(Problem("the base names no end token", str(base), act="set eos_token in its tokenizer"))
    return tuple(sorted(tokenizer.convert_ids_to_tokens(sorted(ids))))


def _template_error(what: str) -> ConfigError:
    return ConfigError(
        Problem(f"chat template: {what}", "model.base", act="use an instruct model, or correct its chat template")
    )
