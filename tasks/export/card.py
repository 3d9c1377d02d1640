"""The files next to exported weights: `export.json` for programs, `README.md` for people, with how to serve them."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_contracts.exports import Distance, Exported, FormMeasured
from tasks.export.gguf import GGUF, MODELFILE
from tasks.export.request import ExportSource
from tasks.reporting.markdown import environment, escape

JSON, CARD = "export.json", "README.md"
_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NONE = "-"


@dataclass(frozen=True)
class Recipe:
    title: str
    language: str
    lines: list[str]


def write_card(found: Exported, source: ExportSource, draft: Path) -> None:
    (draft / JSON).write_text(found.model_dump_json(indent=1), encoding="utf-8")
    from markupsafe import Markup

    recipes = [
        {"title": recipe.title, "block": Markup("```{}\n{}\n```").format(recipe.language, Markup(_fenced(recipe)))}
        for recipe in recipes_of(found, source)
    ]
    page = environment(escape).get_template("export.md.j2")
    text = page.render(found=found, version=source.version, titles=TITLES, rows=rows_of(found), recipes=recipes)
    (draft / CARD).write_text(text, encoding="utf-8")


def _fenced(recipe: Recipe) -> str:
    """Commands as they are, to copy: nothing in them ends the block."""
    return "\n".join(recipe.lines).replace("```", "???")


# --- the table ----------------------------------------------------------------------------------------------

TITLES = (
    "form",
    "KL, nats",
    "loss, nats",
    "same next token",
    "general text, perplexity",
    "learned, kept",
    "as if untaught",
    "MB",
)


def rows_of(found: Exported) -> list[list[str]]:
    """The live model, every form, and what the written files are."""
    rows = [_row("live model", found.live)]
    for form in found.forms:
        mark = " (chosen)" if form == found.chosen else ""
        rows.append(_row(form.label + mark, form.distance, form))
    rows.append(_row("the written files", found.written))
    if found.runtime:
        rows.append(["  in llama.cpp", f"{found.runtime.kl_nats:.2e} or more", *[_NONE] * (len(TITLES) - 2)])
    return rows


def _row(name: str, distance: Distance, form: FormMeasured | None = None) -> list[str]:
    perplexity, delta = distance.general_perplexity, form.delta if form else None
    return [
        name,
        f"{distance.kl_nats:.2e}",
        f"{distance.nll_nats:.4f}",
        f"{distance.agreement:.2%}",
        _NONE if perplexity is None else f"{perplexity:.3f}",
        f"{delta.survival:.1%}" if delta else _NONE,
        f"{delta.unchanged:.1%}" if delta else _NONE,
        f"{form.bytes / 1e6:.0f}" if form else _NONE,
    ]


# --- how to serve it ----------------------------------------------------------------------------------------


def recipes_of(found: Exported, source: ExportSource) -> list[Recipe]:
    """Exact commands, from within the export's folder."""
    kinds: dict[str, Callable[[Exported, ExportSource], list[Recipe]]] = {
        "adapter": _adapter, "merged": _merged, "gguf": _gguf,
    }  # fmt: skip
    return kinds[found.format](found, source)


def _merged(found: Exported, source: ExportSource) -> list[Recipe]:
    dtype = _TORCH[found.chosen.dtype] if found.chosen else "auto"
    name = shlex.quote(source.version.name)
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto", use_safetensors=True)',
    ]  # fmt: skip
    serve = f"vllm serve . --served-model-name {name} --dtype {dtype} --host 127.0.0.1"
    return [Recipe("transformers", "python", load), Recipe("vLLM", "sh", [serve])]


def _adapter(found: Exported, source: ExportSource) -> list[Recipe]:
    """BASE: a base that no hub has."""
    base, name = source.base_name if source.meta["base_revision"] else "BASE", source.version.name
    quantised = source.version.quantisation
    bits = (
        f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type={quantised.quant_type!r}, "
        f"bnb_4bit_use_double_quant={quantised.double_quant}, bnb_4bit_compute_dtype=torch.float32)"
        if quantised else "None"
    )  # fmt: skip
    load = [
        "import torch", "from peft import PeftModel", "from transformers import AutoModelForCausalLM, BitsAndBytesConfig", "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r}, quantization_config={bits}, use_safetensors=True)",
        'model = PeftModel.from_pretrained(base, ".")',
    ]  # fmt: skip
    config = json.loads(Path(source.version.adapter.folder, "adapter_config.json").read_text())
    if "r" not in config or config["use_dora"]:  # vLLM serves plain LoRA only
        return [Recipe("PEFT", "python", load)]
    rank = next((most for most in _VLLM_RANKS if most >= config["r"]), config["r"])
    in_4_bits = "--quantization bitsandbytes " if quantised else ""
    serve = (
        f"vllm serve {shlex.quote(base)} {in_4_bits}--enable-lora --max-lora-rank {rank} "
        f"--lora-modules {shlex.quote(f'{name}=.')} --host 127.0.0.1"
    )
    return [Recipe("PEFT", "python", load), Recipe("vLLM", "sh", [serve])]


def _gguf(found: Exported, source: ExportSource) -> list[Recipe]:
    name = shlex.quote(source.version.name)
    recipes = [Recipe("llama.cpp", "sh", [f"llama-server -m {GGUF} --jinja --host 127.0.0.1"])]
    if MODELFILE in found.files:
        recipes.append(Recipe("Ollama", "sh", [f"ollama create {name} -f {MODELFILE}", f"ollama run {name}"]))
    return recipes
