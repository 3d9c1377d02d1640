"""Read an export back from its files and measure it against the live model: `python -m tasks.export.workers.check_export spec.json out/`.

spec: format, folder (the export's), file (of a GGUF, else null), work (where export_model left exam.json and live.npy),
base, method, quantisation or null, threads. report: distance.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_contracts.errors import Problem, StoreError
from tasks.export.workers.distances import Exam, measure
from tasks.export.workers.merged_forms import live_model
from tasks.models.core.adapter_files import CONFIG, WEIGHTS
from tasks.models.workers.chat_template import load_chat
from tasks.models.workers.loading import load_base
from tasks.models.workers.tree_attention import ATTENTION
from tasks.runtime.workers.device import Device, choose_device
from tasks.runtime.workers.harness import main, say


def check_export(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    device = choose_device("fp32", spec["threads"])
    told = json.loads((Path(spec["work"]) / "exam.json").read_text())
    say("note", text="reading the written files back")
    if spec["format"] != "gguf":
        check_tokenizer(Path(spec["folder"]), told["prompts"])
    model = load_export(spec, device)
    distance = measure(model, Exam.of(told), Path(spec["work"]) / "live.npy", "the written files")
    return {"distance": distance.model_dump()}


def load_export(spec: dict[str, Any], device: Device) -> Any:
    folder = Path(spec["folder"])
    if spec["format"] == "adapter":
        return live_model(spec, device, str(alone(folder, Path(spec["work"]) / "adapter")))
    if spec["format"] == "merged":
        return load_base(folder, "lora", device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=spec["file"], dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
    )
    return model.eval().to(device.device)


def alone(folder: Path, out: Path) -> Path:
    """A copy of the adapter without the tokenizer beside it: an adapter is loaded only where nothing else lies."""
    out.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, out / name)
    return out


def check_tokenizer(folder: Path, prompts: list[tuple[str, list[int]]]) -> None:
    """Raise StoreError if the exported tokenizer reads a prompt otherwise than the live one."""
    chat = load_chat(folder)
    other = [text for text, ids in prompts if chat.encode(text) != ids]
    if other:
        what = f"the exported tokenizer reads {len(other)} of {len(prompts)} prompts otherwise than the live model's"
        raise StoreError(Problem(what, str(folder), act="nothing was exported; report this with the base's name"))


if __name__ == "__main__":
    main(check_export)
