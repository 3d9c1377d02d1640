"""A base's architecture without its weights: `python -m tasks.training.workers.describe_base spec.json out/`.

Reads config.json only; the model is built on torch's meta device, where tensors have shapes and no memory. report: the
fields of tasks.training.core.architecture.Architecture.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_contracts.errors import ConfigError, Problem
from data_contracts.jobs.training import DescribeBaseJob
from tasks.models.workers.scoring import LOGIT_CHANGES
from tasks.runtime.workers.harness import main
from tasks.training.core.architecture import Architecture, Linear, Reads

_ATTENTION_OUT = {"o_proj", "out_proj", "dense", "c_proj", "wo"}
_BLOCK = re.compile(r"\.(\d+)\.")


def describe(job: DescribeBaseJob, out: Path) -> dict[str, Any]:
    return dataclasses.asdict(architecture_at(job.base, job.revision))


def architecture_at(base: str, revision: str | None) -> Architecture:
    """Raises ConfigError where no configuration can be read, and as `architecture_of` does."""
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        act = "go online once, or give a folder with config.json, or a known shape such as llama-2-7b"
        what = f"no configuration can be read: {str(error).strip().splitlines()[0]}"
        raise ConfigError(Problem(what, base, "a model of transformers that runs no code of its own", act)) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return architecture_of(model)


def architecture_of(model: Any) -> Architecture:
    """Read a decoder's widths off its modules, on the meta device or loaded, quantised or not.

    Raises ConfigError for what the planner has no formulas for: no attention, mixtures of experts, blocks that differ.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        raise _refusal(model, "it has no attention heads")
    layers, hidden, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    named = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_features")]
    blocks: dict[str, list[Linear]] = {}
    for name, module in named:
        if found := _BLOCK.search(name):
            blocks.setdefault(found[1], []).append(_linear(name[found.end() :], module))
    linears = tuple(next(iter(blocks.values()), []))
    head = next((module for name, module in named if not _BLOCK.search(name)), None)
    names = [name for name, _ in model.named_modules()]
    norms = [name for name in names if _BLOCK.search(name) and _is_norm(name)]
    arch = Architecture(
        hidden=hidden,
        layers=layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or hidden // config.num_attention_heads,
        vocab=vocab,
        tied=bool(config.tie_word_embeddings),
        linears=linears,
        norm_parameters=_norm_parameters(model),
        norms=sum(not _is_head_norm(name) for name in norms) // max(1, layers),
        rms_norm=not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules()),
        qk_norm=any(_is_head_norm(name) for name in norms),
        head_bias=getattr(head, "bias", None) is not None,
        logits_changed=any(getattr(config, name, None) for name in LOGIT_CHANGES),
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        activation=str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")),
    )
    _check(model, arch, blocks.values())
    return arch


def _linear(name: str, module: Any) -> Linear:
    """name: from the block on, such as `self_attn.q_proj`."""
    parent, _, short = name.rpartition(".")
    inputs, outputs = int(module.in_features), int(module.out_features)
    if "att" in parent:
        reads: Reads = "attention_out" if short in _ATTENTION_OUT else "attention_in"
    else:
        reads = "mlp_out" if short in ("down_proj", "fc2", "w2", "c_proj", "dense_4h_to_h") else "mlp_in"
    return Linear(short, inputs, outputs, reads, getattr(module, "bias", None) is not None)


def _is_norm(name: str) -> bool:
    return "norm" in name.rpartition(".")[2] or re.search(r"\.ln_\d$", name) is not None


def _is_head_norm(name: str) -> bool:
    return name.rpartition(".")[2] in ("q_norm", "k_norm")


def _norm_parameters(model: Any) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _is_norm(name.rpartition(".")[0]))


def _check(model: Any, arch: Architecture, blocks: Iterable[list[Linear]]) -> None:
    """A count that is off means a part without a formula: better no plan than a wrong one."""
    alike = len({tuple(block) for block in blocks}) == 1
    reads = {linear.reads for linear in arch.linears}
    counted = sum(_elements(parameter) for parameter in model.parameters())
    if alike and len(reads) == 4 and counted == arch.parameters:
        return
    what = f"the planner counts {arch.parameters:,} parameters, the model has {counted:,}"
    raise _refusal(model, what if alike else "its blocks differ, or hold no linear layers")


def _refusal(model: Any, what: str) -> ConfigError:
    limit = "decoders whose blocks are alike: attention and one feed-forward part (no experts, no image or state parts)"
    return ConfigError(Problem(what, type(model).__name__, limit, "plan a base of that form"))


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


if __name__ == "__main__":
    main(describe, DescribeBaseJob)
