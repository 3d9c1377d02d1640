"""The forward pass that training and evaluation share: losses of the scored tokens of one packed row.

The vocabulary projection is computed only at the positions that predict a scored token.
"""

from typing import Any

import torch
import torch.nn.functional as F

from tasks.core.packing import Pack

Batch = dict[str, torch.Tensor]


def to_tensors(pack: Pack) -> Batch:
    """input_ids [1,T], position_ids [1,T], attention_mask [1,1,T,T] bool, keep [K], logit_index [N], labels [N]."""
    return {
        "input_ids": torch.from_numpy(pack.input_ids_T)[None],
        "position_ids": torch.from_numpy(pack.position_ids_T)[None],
        "attention_mask": torch.from_numpy(pack.attention_mask_TT())[None, None],
        "keep": torch.from_numpy(pack.keep_K),
        "logit_index": torch.from_numpy(pack.logit_index_N),
        "labels": torch.from_numpy(pack.targets_N),
    }


def scored_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits in fp32 that predict each scored token: [N, V]."""
    logits: torch.Tensor = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        logits_to_keep=batch["keep"],
        use_cache=False,
    ).logits[0]
    if len(batch["keep"]) != len(batch["labels"]):  # only where sequences share scored tokens
        logits = logits[batch["logit_index"]]
    return logits.float()


def scored_losses(model: Any, batch: Batch) -> torch.Tensor:
    """Loss of each scored token in nats: [N]."""
    return F.cross_entropy(scored_logits(model, batch), batch["labels"], reduction="none")
