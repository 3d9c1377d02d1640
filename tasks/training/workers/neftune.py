"""NEFTune (arXiv 2310.05914): uniform noise on a sequence's embeddings while it trains.

Trainer's own hook takes the length of the whole row as the sequence's: in a packed row the noise would be too small.
Here each token's noise depends on its own sequence. Shapes: B rows, T tokens, D hidden size.
"""

from typing import Any

import torch

from tasks.models.workers.scoring import Batch


def add_noise(model: Any, alpha: float) -> None:
    """Add noise of up to alpha / sqrt(length of the sequence x D) to each embedding, in training mode only.

    Tokens that several sequences of a packed row share get one noise, by the length of one of these.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    lengths: dict[str, torch.Tensor] = {}

    def note(_: Any, __: tuple[Any, ...], inputs: Batch) -> None:
        lengths["now"] = lengths_of(inputs)

    def disturb(embedding: torch.nn.Module, _: tuple[Any, ...], output: Any) -> Any:
        if not embedding.training:
            return output
        most = alpha / (lengths["now"] * output.shape[-1]).sqrt()
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1) * most[..., None]
        return output + noise.to(output.dtype)

    causal.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    causal.get_input_embeddings().register_forward_hook(disturb)


def lengths_of(inputs: Batch) -> torch.Tensor:
    """Tokens of the sequence that each token belongs to: [1,T] of a packed row, [B,1] of padded ones."""
    if "tree" not in inputs:
        mask: torch.Tensor = inputs["attention_mask"]
        own = mask[:, -inputs["input_ids"].shape[1] :]  # the columns before are a trained prefix
        return own.sum(dim=1, keepdim=True).to(torch.float32)
    own_tokens, seen = torch.tensor(inputs["tree"].seen, device=inputs["input_ids"].device).T
    lengths: torch.Tensor = seen.repeat_interleave(own_tokens)[None]
    return lengths.to(torch.float32)
