"""Read an export back from its files and measure it against the live model: `python -m tasks.export.workers.check_export spec.json out/`."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data_contracts.errors import Problem, StoreError
from data_contracts.jobs.export import LIVE_FILE, TEXTS_FILE, CheckExportJob, CheckExportReport, HeldOutTexts
from tasks.export.workers.distances import measure
from tasks.export.workers.merged_forms import live_model
from tasks.models.core.adapter_files import CONFIG, WEIGHTS
from tasks.models.workers.chat_template import load_chat
from tasks.models.workers.loading import load_base
from tasks.models.workers.tree_attention import ATTENTION
from tasks.runtime.workers.device import Device, choose_device
from tasks.runtime.workers.harness import main, say


def check_export(job: CheckExportJob, out: Path) -> dict[str, Any]:
    """Report the distance of the files from the live model. Raises StoreError for another tokenizer."""
    device = choose_device("fp32", job.threads)
    work = Path(job.work)
    texts = HeldOutTexts.model_validate_json((work / TEXTS_FILE).read_bytes())
    say("note", text="reading the written files back")
    if job.format != "gguf":
        check_tokenizer(Path(job.folder), texts.prompts)
    distance = measure(load_export(job, device), texts, work / LIVE_FILE, "the written files")
    return CheckExportReport(distance=distance).model_dump(mode="json")


def load_export(job: CheckExportJob, device: Device) -> Any:
    """The exported model, from its files."""
    folder = Path(job.folder)
    if job.format == "adapter":
        adapter_folder = copy_adapter(folder, Path(job.work) / "adapter")
        own = job.model.model_copy(update={"adapter_folder": str(adapter_folder)})
        return live_model(job.model_copy(update={"model": own}), device)
    if job.format == "merged":
        return load_base(folder, "lora", device)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=job.file, dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
    )
    return model.eval().to(device.device)


def copy_adapter(folder: Path, out: Path) -> Path:
    """The adapter without the tokenizer: an adapter is only loaded from a folder that holds nothing else."""
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
    main(check_export, CheckExportJob)
