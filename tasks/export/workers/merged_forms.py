"""A version as one set of weights: an adapter added to one of two bases, stored in one of several number formats."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from data_contracts.exports import BYTES_OF_A_WEIGHT, Dtype, FormMeasured, MergeBase
from data_contracts.jobs.export import ExportJob, HeldOutTexts, LiveModelJob
from tasks.export.core.merging import Rounding, rounding
from tasks.export.workers.distances import measure
from tasks.models.workers.chat_template import Chat
from tasks.models.workers.forms import attach_adapter, form_of, load_form, merge
from tasks.models.workers.loading import load_base
from tasks.runtime.workers.device import Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_Q8_BLOCK = 32
_SHARD = "2GB"


def live_model(job: LiveModelJob, device: Device) -> Any:
    """As it was trained and evaluated: the adapter on its base, in 4 bits if that was quantised; or its own weights."""
    return attach_adapter(load_form(form_of(job.model), Path(job.base), device), job.model)


def merged_model(job: LiveModelJob, base: MergeBase, device: Device, sums: dict[Dtype, Rounding]) -> Any:
    """The sum in fp32. sums: what each number format would leave of what was learned is added to it."""

    def watch(before: torch.Tensor, exact: torch.Tensor) -> None:
        for kind in sums:
            four = (before, exact, as_stored(exact, kind), as_stored(before, kind))
            sums[kind] += rounding(*(numbers.cpu().numpy() for numbers in four))

    live = job.model
    if live.method == "full":
        return live_model(job, device)
    assert live.adapter_folder, "only a fully tuned version has no adapter"
    if base == "full":
        model: Any = load_base(Path(job.base), "lora", device)
    else:
        assert live.quantisation, "only a quantised base can be dequantised"
        model = load_base(Path(job.base), "qlora", device, live.quantisation)
        model = model.dequantize(dtype=torch.float32)
    return merge(model, live.adapter_folder, watch)


def measured_forms(
    job: ExportJob, base: MergeBase, texts: HeldOutTexts, device: Device, live: Path
) -> Iterator[FormMeasured]:
    """Every number format on one base, measured against the live model's log-probabilities."""
    sums: dict[Dtype, Rounding] = dict.fromkeys(job.dtypes, Rounding())
    model = merged_model(job, base, device, sums)
    exact = {name: weight.data for name, weight in model.named_parameters()}
    for kind, kept in sums.items():
        for name, weight in model.named_parameters():
            weight.data = as_stored(exact[name], kind, only_matrices=job.is_gguf)
        yield FormMeasured(
            base=base,
            dtype=kind,
            distance=measure(model, texts, live, f"{base} base, {kind}"),
            delta=None if job.model.method == "full" else kept.survival(),
            bytes=int(sum(weight.numel() for weight in model.parameters()) * BYTES_OF_A_WEIGHT[kind]),
        )


def as_stored(weight: torch.Tensor, kind: Dtype, *, only_matrices: bool = False) -> torch.Tensor:
    """A weight rounded to what it is stored in, in fp32 again. only_matrices: a GGUF keeps all others in fp32."""
    if kind == "fp32" or (only_matrices and weight.ndim < 2):
        return weight
    if kind != "q8_0":
        return weight.to(DTYPES[kind]).float()
    if weight.ndim < 2 or weight.shape[-1] % _Q8_BLOCK:
        return weight.half().float()
    numbers = quantize(weight.cpu().numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(dequantize(numbers, GGMLQuantizationType.Q8_0)).to(weight.device)


def save_model(model: Any, kind: Dtype, chat: Chat, folder: Path) -> None:
    """Weights in shards, configuration, tokenizer with its chat template: what AutoModelForCausalLM loads."""
    model.to(DTYPES[kind])
    model.config.use_cache = True  # off while it is measured
    model.generation_config.eos_token_id = chat.stop_ids
    model.save_pretrained(folder, max_shard_size=_SHARD)
    chat.tokenizer.save_pretrained(folder)
