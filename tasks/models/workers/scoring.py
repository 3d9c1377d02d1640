"""The forward pass that training and evaluation share: losses of the scored tokens of some sequences.

Two ways, one result: `packed`, a prefix tree in one row, with attention by segment and the vocabulary projection at
scored positions only; and `padded`, the plain Hugging Face forward, for models that the first does not cover.
`choose_way` compares them on the loaded model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tasks.models.core.packing import Pack, ScoredSequence, Way, pack
from tasks.models.workers.head_loss import HeadLoss, TrainedHeadLoss
from tasks.models.workers.tree_attention import ATTENTION
from tasks.runtime.workers.device import arithmetic

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of a base whose logits are not plainly hidden states times the vocabulary projection."""

Batch = dict[str, Any]
# Root mean square of the differences of tokens' losses, in nats, up to which the two ways are the same arithmetic in another
# order. A single token says little in 16 bits: with other kernels for another shape it moves by 0.3 (docs/log.md).
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}

COMPARED = 4  # sequences scored both ways before a model is used


@dataclass(frozen=True)
class Scoring:
    """How losses are computed, and why."""

    way: Way
    reason: str


def to_tensors(sequences: Sequence[ScoredSequence], way: Way = "packed") -> Batch:
    """A batch of the sequences as `scored_losses` takes it; `labels` [N] are the scored tokens, one sequence after the
    other."""
    return _packed(pack(sequences)) if way == "packed" else _padded(sequences)


def _packed(packed: Pack) -> Batch:
    """input_ids [1,T], position_ids [1,T], keep [K], logit_index [N], labels [N], and the tree."""
    return {
        "input_ids": torch.from_numpy(packed.input_ids_T)[None],
        "position_ids": torch.from_numpy(packed.position_ids_T)[None],
        "keep": torch.from_numpy(packed.keep_K),
        "logit_index": torch.from_numpy(packed.logit_index_N),
        "labels": torch.from_numpy(packed.targets_N),
        "tree": packed.tree,
    }


def _padded(sequences: Sequence[ScoredSequence]) -> Batch:
    """input_ids [B,T], attention_mask [B,T], scored [B,T] (the positions that predict a scored token), labels [N]."""
    longest = max(len(sequence.ids) for sequence in sequences) - 1
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids) - 1
        ids[row, :length] = torch.tensor(sequence.ids[:-1])
        mask[row, :length] = 1
        scored[row, sequence.start - 1 : length] = True
    labels = torch.tensor([token for sequence in sequences for token in sequence.ids[sequence.start :]])
    return {"input_ids": ids, "attention_mask": mask, "scored": scored, "labels": labels}


def scored_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits in fp32 that predict each scored token: [N, V]."""
    if "tree" not in batch:
        logits: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return logits[batch["scored"]].float()
    logits = model(logits_to_keep=batch["keep"], **_inputs(model, batch)).logits[0]
    return logits[batch["logit_index"]].float() if _shares(batch) else logits.float()


def scored_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Loss of each scored token in nats: [N]."""
    head = _plain_head(model)
    if "tree" not in batch or head is None:
        return F.cross_entropy(scored_logits(model, batch), batch["labels"], reduction="none")
    decoder = _causal(model).get_decoder()
    hidden_KD = decoder(**_inputs(model, batch)).last_hidden_state[0, batch["keep"]]
    hidden_ND = hidden_KD[batch["logit_index"]] if _shares(batch) else hidden_KD
    apply: Any = HeadLoss.apply
    if head.requires_grad and torch.is_grad_enabled():
        # Autocast reaches no custom backward, so it is done here, and autograd takes the gradients back to fp32.
        apply, dtype = TrainedHeadLoss.apply, arithmetic(head)
        hidden_ND, head = hidden_ND.to(dtype), head.to(dtype)
    losses: torch.Tensor = apply(hidden_ND, head, batch["labels"])
    return losses


def choose_way(model: Any, sequences: Sequence[ScoredSequence], longest: int) -> Scoring:
    """`packed` if the losses of the shortest few sequences are what `padded` computes on this model.

    `longest`: most tokens of a sequence to come. Where the answer is `padded`, the model is left with an attention that
    it is sure to have.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return Scoring(
            "padded", "a trained prefix comes as a cache of keys and values, which a packed row has no place for"
        )
    device = next(model.parameters()).device
    window = getattr(_causal(model).config, "sliding_window", None)
    if window and longest > window:
        _causal(model).set_attn_implementation("sdpa")
        return Scoring("padded", f"rows of up to {longest} tokens are longer than the attention's window of {window}")
    # The shortest: a padded forward holds all logits, and must not be what takes the most memory in a run.
    sequences = sorted(sequences, key=lambda sequence: len(sequence.ids))[:COMPARED]
    with torch.no_grad():
        try:
            found = scored_losses(model, to_device(to_tensors(sequences), device))
        except (NotImplementedError, TypeError, AttributeError, ValueError) as error:
            _causal(model).set_attn_implementation("eager")
            return Scoring("padded", f"this architecture cannot be packed: {error}")
        expected = scored_losses(model, to_device(to_tensors(sequences, "padded"), device))
    difference = float((found - expected).square().mean().sqrt())
    if difference <= _TOLERANCE[_causal(model).dtype]:
        return Scoring("packed", f"losses equal the padded forward's ({difference:.1e} nats apart, root mean square)")
    _causal(model).set_attn_implementation("sdpa")
    return Scoring(
        "padded", f"packed losses differ from the padded forward's by {difference:.1e} nats, root mean square"
    )


def to_device(batch: Batch, device: Any) -> Batch:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _inputs(model: Any, batch: Batch) -> Batch:
    if _causal(model).config._attn_implementation != ATTENTION:
        raise NotImplementedError("a packed row needs the prefix tree's attention")
    # A mask of four dimensions is passed on as it is: the attention follows the tree and needs none.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch["input_ids"].device)
    return {
        "input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": no_mask,
        "use_cache": False, "tree": batch["tree"],
    }  # fmt: skip


def _shares(batch: Batch) -> bool:
    """Whether sequences share scored tokens, so that one position stands for several."""
    return len(batch["keep"]) != len(batch["labels"])


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain_head(model: Any) -> torch.Tensor | None:
    """The vocabulary projection [V, D] if losses may be computed from hidden states: plain, its logits as they are."""
    head = _causal(model).get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return None
    return None if any(getattr(model.config, name, None) for name in LOGIT_CHANGES) else head.weight
