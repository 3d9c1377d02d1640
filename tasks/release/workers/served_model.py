"""The registered model: an adapter on its base, or all weights, answered through mlflow.pyfunc (models-from-code).

MLflow copies this file into every model version and runs it on its own, so it imports nothing of Tunegate. `meta.json`
next to the adapter names the base, the form it is loaded in (full precision or 4 bits, as evaluated), and the sha256 of
the adapter's files and of the base: with others nothing is loaded. The base itself is found, in this order: in
$TUNEGATE_BASE_DIR; in a store above this model or above the working directory; on the hub, if it came from there. torch is
imported when a model is loaded, not when it is logged.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import mlflow

# What is asked of the hub: never a pickle, never code. As in tasks/models/workers/prepare_base.py.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.tiktoken", "*.model", "*.txt"]


class ServedModel(mlflow.pyfunc.PythonModel):
    """predict(questions, params={"max_new_tokens": 64}) -> greedy answers."""

    def load_context(self, context: Any) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.meta = json.loads(Path(context.artifacts["meta"]).read_text())
        adapter = registered_adapter(Path(context.artifacts["adapter"]), self.meta["adapter_files"])
        base = find_base(self.meta, [adapter, Path.cwd()])
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self.meta["chat_template"]
        self.stops: Any = self.tokenizer.convert_tokens_to_ids(self.meta["stops"])
        is_full = self.meta["method"] == "full"
        model = AutoModelForCausalLM.from_pretrained(
            adapter if is_full else base, use_safetensors=True, trust_remote_code=False, **self._form()
        )
        layer: Any
        for layer in model.modules():
            # On CPUs with AVX512_BF16 bitsandbytes would repack 4-bit weights for its bf16 kernel at the first answer: other
            # arithmetic than it was evaluated in (bases.keep_the_weights).
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        self.model = model.eval() if is_full else PeftModel.from_pretrained(model, adapter).eval()

    def _form(self) -> dict[str, Any]:
        import torch
        from transformers import BitsAndBytesConfig

        dtype = torch.bfloat16 if self.meta["precision"] == "bf16" and torch.cuda.is_available() else torch.float32
        form: dict[str, Any] = {"dtype": dtype, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}
        quantisation = self.meta["quantisation"]
        if quantisation:
            form["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantisation["quant_type"],
                bnb_4bit_use_double_quant=quantisation["double_quant"],
                bnb_4bit_compute_dtype=dtype,
            )
        return form

    # No type hints here: MLflow would put a signature of its own in place of ours, and drop the parameters.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        rows = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        most = int((params or {}).get("max_new_tokens", 64))
        return [self._answer(str(question), most) for question in rows]

    def _answer(self, question: str, most_tokens: int) -> str:
        messages = [{"role": "system", "content": self.meta["system_prompt"]}] if self.meta["system_prompt"] else []
        messages.append({"role": "user", "content": question})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").to(self.model.device)
        written = self.model.generate(
            **inputs, max_new_tokens=most_tokens, do_sample=False, eos_token_id=self.stops, pad_token_id=self.stops[0]
        )
        answer = self.tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return str(answer).strip()


def registered_adapter(folder: Path, files: dict[str, str]) -> Path:
    """The adapter's folder. Raises ValueError unless it holds the named files, as they were registered, and nothing else:
    a pickle, code or a link next to them could run or be read in their place."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    wrong = sorted(found.keys() ^ files.keys())
    wrong += [
        name for name in found.keys() & files.keys() if found[name].is_symlink() or _sha256(found[name]) != files[name]
    ]
    if wrong:
        raise ValueError(f"{folder} is not the adapter that was registered: {', '.join(map(ascii, wrong[:8]))}")
    return folder


def find_base(meta: dict[str, Any], starts: list[Path]) -> str:
    """The folder or hub id of the base. Raises FileNotFoundError, or ValueError if its files are not the trained ones."""
    for folder in _candidates(meta, starts):
        if (folder / "config.json").exists():
            return str(_checked_base(folder, meta))
    if meta["base_revision"]:
        from huggingface_hub import snapshot_download

        found = snapshot_download(meta["base"], revision=meta["base_revision"], allow_patterns=_HUB_FILES)
        return str(_checked_base(Path(found), meta))
    raise FileNotFoundError(
        f"base {meta['base']} is not found: set TUNEGATE_BASE_DIR to its folder, or TUNEGATE_STORE_DIR to the store's"
    )


def _checked_base(folder: Path, meta: dict[str, Any]) -> Path:
    if folder_digest(folder) != meta["base_digest"]:
        act = "every file in it counts; TUNEGATE_BASE_DIR names another folder"
        raise ValueError(
            f"{folder} is not the base this adapter was trained on (expected {meta['base_digest']}); {act}"
        )
    return folder


def _candidates(meta: dict[str, Any], starts: list[Path]) -> Iterator[Path]:
    if "TUNEGATE_BASE_DIR" in os.environ:
        yield Path(os.environ["TUNEGATE_BASE_DIR"])
    if "TUNEGATE_STORE_DIR" in os.environ:
        yield Path(os.environ["TUNEGATE_STORE_DIR"]) / "store" / meta["base_path"]
    for parent in (parent for start in starts for parent in start.resolve().parents):
        yield parent / "store" / meta["base_path"]
        yield parent / "mlruns" / "store" / meta["base_path"]


def folder_digest(folder: Path) -> str:
    """Hex sha256 of a folder's sorted (relative path, file digest) pairs, as the store computes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder).as_posix()} {_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if not __name__.startswith("tasks."):  # MLflow runs this file to find the model; an import of it must not
    with suppress(OSError):  # where nothing can be written
        # Python's compiled copy of this file is none of the version's files, and would run in its place the next time.
        Path(cache_from_source(__file__)).unlink(missing_ok=True)
    mlflow.models.set_model(ServedModel())
