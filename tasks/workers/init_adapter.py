"""Make the step-0 adapter that every arm starts from: `python -m tasks.workers.init_adapter spec.json out/`.

spec: base (folder), seed, rank, alpha, dropout, target_modules. Writes out/adapter/.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from data_contracts.errors import ConfigError, Problem
from tasks.workers.harness import main


def init_adapter(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """LoRA A is drawn at random and B is zero, so the adapter changes nothing yet."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec["dropout"],
        target_modules=spec["target_modules"],
    )
    base = AutoModelForCausalLM.from_pretrained(
        spec["base"], dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    # Trainer seeds only later, after LoRA A would have been drawn.
    set_seed(spec["seed"])
    try:
        model: Any = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(
            Problem(str(error), "train.target_modules", act="use all-linear, or names of layers")
        ) from error
    model.save_pretrained(out / "adapter")
    return {"trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad)}


if __name__ == "__main__":
    main(init_adapter)
