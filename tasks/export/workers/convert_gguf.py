"""Convert a folder of weights to one GGUF with llama.cpp's own converter: `python -m tasks.export.workers.convert_gguf spec.json out/`."""

import runpy
import sys
from pathlib import Path
from typing import Any

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.export import ConvertJob
from tasks.runtime.workers.harness import main, say

_TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "q8_0": "q8_0"}
_ACT = "export with --format merged, and convert that with a llama.cpp that knows this model: convert_hf_to_gguf.py DIR"


def convert_gguf(job: ConvertJob, out: Path) -> dict[str, Any]:
    """Report the file's size. Raises ConfigError for a model or a tokenizer that the converter does not know."""
    say("note", text=f"converting to GGUF, {job.dtype}")
    script = Path(job.converter)
    sys.path.insert(0, str(script.parent))
    options = ["--outfile", job.file, "--outtype", _TYPES[job.dtype], "--model-name", job.name]
    sys.argv = [str(script), job.folder, *options]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except NotImplementedError as error:
        raise ConfigError(
            Problem(f"llama.cpp's converter does not know it: {_line(error)}", "--format gguf", act=_ACT)
        ) from error
    except SystemExit as end:  # its log says why
        raise ConfigError(
            Problem(f"llama.cpp's converter ended with {end.code}: see {out / 'worker.log'}", "--format gguf", act=_ACT)
        ) from end
    return {"bytes": Path(job.file).stat().st_size}


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    main(convert_gguf, ConvertJob)
