"""Merge a version in every form asked for, measure each against the live model, and write the one that was chosen:
`python -m tasks.export.workers.export_model spec.json out/`.

spec: base, adapter, method, quantisation or null, test, max_items, max_tokens, max_passages, threads, bases, dtypes (the
forms are their product; none only measures the live model), is_gguf, tolerance_nats.
report: live, forms, chosen (null if none is near enough), items, tokens, turns (how the chat template writes a
conversation). out/: live.npy, exam.json, tokenizer/, and model/ if one was chosen; in fp32 for a GGUF, which rounds itself.
"""

import gc
import json
from pathlib import Path
from typing import Any

from tasks.export.core.merging import choose
from tasks.export.core.modelfile import CONVERSATION, QUESTION
from tasks.export.workers.distances import make_exam, measure_live
from tasks.export.workers.merged_forms import live_model, measured_forms, merged_model, save
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.runtime.core.files import write_atomically
from tasks.runtime.workers.device import Device, choose_device
from tasks.runtime.workers.harness import main, say


def export_model(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    device = choose_device("fp32", spec["threads"])
    chat = load_chat(Path(spec["base"]))
    say("note", text="loading the live model; all forms are computed in fp32, so that only weights differ")
    model = live_model(spec, device, spec["adapter"])
    exam = make_exam(spec, chat, model.config.get_text_config().vocab_size)
    write_atomically(out / "exam.json", json.dumps(exam.told(), indent=1))
    live = measure_live(model, exam, out / "live.npy")
    del model
    gc.collect()
    forms = [form for base in spec["bases"] for form in measured_forms(spec, base, exam, device, out / "live.npy")]
    chosen = choose(forms, spec["tolerance_nats"])
    if chosen:
        _write(spec, chosen.base, "fp32" if spec["is_gguf"] else chosen.dtype, chat, device, out / "model")
    chat.tokenizer.save_pretrained(out / "tokenizer")
    return {
        "live": live.model_dump(),
        "forms": [form.model_dump() for form in forms],
        "chosen": chosen.model_dump() if chosen else None,
        "items": len(exam.rows),
        "tokens": exam.tokens,
        "turns": [chat.prompt(QUESTION), chat.prompt(CONVERSATION)],
    }


def _write(spec: dict[str, Any], base: Any, dtype: Any, chat: Chat, device: Device, folder: Path) -> None:
    gc.collect()  # the last form that was measured
    say("note", text=f"writing the {base} base with the adapter in {dtype}")
    save(merged_model(spec, base, device, {}), dtype, chat, folder)


if __name__ == "__main__":
    main(export_model)
