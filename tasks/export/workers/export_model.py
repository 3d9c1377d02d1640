"""Merge a version in every form asked for, measure each against the live model, and write the one that was chosen:
`python -m tasks.export.workers.export_model spec.json out/`.

Writes out/live.npy (the live model's log-probabilities), out/texts.json, out/tokenizer/, and out/model/ if a form was chosen;
in fp32 for a GGUF, whose converter rounds.
"""

import gc
from pathlib import Path
from typing import Any

from data_contracts.exports import Dtype, MergeBase
from data_contracts.jobs.export import LIVE_FILE, TEXTS_FILE, ExportJob, FormsReport
from tasks.export.core.merging import choose_form
from tasks.export.core.modelfile import CONVERSATION, QUESTION
from tasks.export.workers.distances import held_out_texts, measure_live, scored_tokens
from tasks.export.workers.merged_forms import live_model, measured_forms, merged_model, save_model
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.runtime.core.files import write_atomically
from tasks.runtime.workers.device import Device, choose_device
from tasks.runtime.workers.harness import main, say


def export_model(job: ExportJob, out: Path) -> dict[str, Any]:
    """Measure every form and write the nearest: a FormsReport."""
    device = choose_device("fp32", job.threads)
    chat = load_chat(Path(job.base))
    say("note", text="loading the live model; all forms are computed in fp32, so that only weights differ")
    model = live_model(job, device)
    texts = held_out_texts(job, chat, model.config.get_text_config().vocab_size)
    write_atomically(out / TEXTS_FILE, texts.model_dump_json(indent=1))
    live = measure_live(model, texts, out / LIVE_FILE)
    del model
    gc.collect()
    forms = [form for base in job.bases for form in measured_forms(job, base, texts, device, out / LIVE_FILE)]
    chosen = choose_form(forms, job.tolerance_nats)
    if chosen:
        _write(job, chosen.base, "fp32" if job.is_gguf else chosen.dtype, chat, device, out / "model")
    chat.tokenizer.save_pretrained(out / "tokenizer")
    report = FormsReport(
        live=live, forms=forms, chosen=chosen, items=len(texts.rows), tokens=scored_tokens(texts),
        conversations=[chat.prompt(QUESTION), chat.prompt(CONVERSATION)],
    )  # fmt: skip
    return report.model_dump(mode="json")


def _write(job: ExportJob, base: MergeBase, dtype: Dtype, chat: Chat, device: Device, folder: Path) -> None:
    gc.collect()  # the last form that was measured
    say("note", text=f"writing the {base} base with the adapter in {dtype}")
    save_model(merged_model(job, base, device, {}), dtype, chat, folder)


if __name__ == "__main__":
    main(export_model, ExportJob)
