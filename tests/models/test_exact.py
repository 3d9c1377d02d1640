"""The fast way gives the losses and gradients of the plain Hugging Face forward. Run: pytest
tests/models/test_exact.py"""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.models.core.packing import ScoredSequence, pack
from tasks.models.workers.fused_layers import fuse_lora, fuse_mlp, fuse_norms
from tasks.models.workers.head_loss import HeadLoss
from tasks.models.workers.pissa_olora_loftq import take_off_start
from tasks.models.workers.scoring import Scoring, choose_way, scored_logits, scored_losses, to_tensors
from tasks.models.workers.tree_attention import ATTENTION, CpuAttention, by_sdpa
from tests.support.packed import attention_mask_TT

SMALL = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# Architecture -> linear layers with a fused adapter, fused norms (Phi and GPT-NeoX have LayerNorm).
COVERED = {
    "llama": (14, 5), "mistral": (14, 5), "qwen2": (14, 5), "qwen3": (14, 9), "gemma": (14, 5), "gemma3_text": (14, 13),
    "phi": (12, 0), "phi3": (8, 5), "gpt_neox": (8, 0), "granite": (14, 5), "olmo2": (14, 9),
}  # fmt: skip
SWIGLU = {"llama", "mistral", "qwen2", "qwen3", "granite", "olmo2"}  # their feed-forward part is one node


def tiny(kind: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return model.requires_grad_(False).eval()


def some_sequences() -> list[ScoredSequence]:
    """A common beginning, one question with two answers, and an answer that begins like another."""
    draw = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(3, 300, (count,), generator=draw).tolist()

    start = tokens(7)
    rows = [ScoredSequence([*start, *tokens(3 + i), *tokens(4 + 2 * i)], 10 + i) for i in range(5)]
    rows.append(ScoredSequence([*rows[0].ids[: rows[0].start], 5, 6, 7], rows[0].start))
    rows.append(ScoredSequence([*rows[1].ids[: rows[1].start + 2], 9], rows[1].start))
    return rows


def with_lora(model, dropout: float = 0.0, **settings):
    torch.manual_seed(2)
    adapter = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout, **settings
    )
    return get_peft_model(model, adapter)


def set_block(monkeypatch, rows: int, columns: int) -> None:
    monkeypatch.setattr("tasks.models.workers.head_loss.BLOCK_ROWS", rows)
    monkeypatch.setattr("tasks.models.workers.head_loss.BLOCK_COLUMNS", columns)


def gradients(model, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    losses = scored_losses(model, to_tensors(some_sequences(), way))
    losses.mean().backward()
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return losses.detach(), torch.cat(found)


@pytest.mark.parametrize(("kind", "fused"), COVERED.items())
def test_losses_and_gradients_equal_the_padded_forward(kind, fused):
    model = tiny(kind)
    assert choose_way(model, some_sequences(), 32).way == "packed"
    tuned = with_lora(model)
    expected, wanted = gradients(tuned, "padded")
    assert (fuse_lora(tuned), fuse_norms(tuned)) == fused
    assert fuse_mlp(tuned) == (2 if kind in SWIGLU else 0)
    losses, found = gradients(tuned, "packed")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("attend", [CpuAttention.apply, partial(by_sdpa, dropout=0.0)], ids=["node", "sdpa"])
def test_attention_by_segments_is_that_of_a_row_with_the_trees_mask(attend):
    packed = pack(
        [ScoredSequence([*range(1, 41), *range(i, i + n)], 40) for i, n in ((100, 300), (500, 150), (700, 9))]
    )
    tokens = len(packed.input_ids_T)
    torch.manual_seed(0)
    own = [torch.randn(1, heads, tokens, 16, requires_grad=True) for heads in (6, 2, 2)]
    other = [x.detach().clone().requires_grad_() for x in own]
    expected = scaled_dot_product_attention(
        *other, attn_mask=torch.from_numpy(attention_mask_TT(packed)), scale=0.3, enable_gqa=True
    )
    found = attend(*own, packed.tree, 0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    slope = torch.randn_like(found)
    (found * slope).sum().backward()
    (expected.transpose(1, 2) * slope).sum().backward()
    for x, y in zip(own, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("settings", "fused"), [({"use_rslora": True}, 14), ({"use_dora": True}, 0)])
def test_rslora_is_fused_with_its_own_scale_and_dora_stays_pefts(settings, fused):
    tuned = with_lora(tiny("llama"), **settings)
    expected, wanted = gradients(tuned, "padded")
    assert fuse_lora(tuned) == fused
    losses, found = gradients(tuned, "packed")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_start_that_is_taken_off_is_fused_with_the_same_gradients():
    tuned = with_lora(tiny("llama"))
    take_off_start(tuned)
    with torch.no_grad():  # a step away from the start, where nothing is left of it
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    expected, wanted = gradients(tuned, "padded")
    assert fuse_lora(tuned) == 14
    losses, found = gradients(tuned, "packed")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("block", [(5, 70), (2048, 2048)])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_full_tuning_has_the_gradients_of_the_padded_forward_also_where_the_embedding_is_the_head(
    monkeypatch, kind, tied, block
):
    set_block(monkeypatch, *block)
    model = tiny(kind, tie_word_embeddings=tied).requires_grad_(True)
    expected, wanted = gradients(model, "padded")
    losses, found = gradients(model, "packed")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(scored_losses(model, to_tensors(some_sequences())).detach(), losses)


def test_full_tuning_under_autocast_keeps_fp32_gradients_near_those_of_fp32():
    model = tiny("llama").requires_grad_(True)
    _, wanted = gradients(model, "packed")
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model, "packed")
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_attention_that_the_tree_does_not_compute_is_padded_and_says_why(kind):
    model = tiny(kind)
    scoring = choose_way(model, some_sequences(), 32)
    assert scoring.way == "padded"
    assert "softcap or sinks" in scoring.reason
    gradients(with_lora(model), "padded")
    with pytest.raises(NotImplementedError):
        scored_losses(model, to_tensors(some_sequences()))


def test_a_window_shorter_than_a_path_is_padded():
    model = tiny("mistral", sliding_window=8)
    assert "window of 8" in choose_way(model, some_sequences(), 32).reason
    gradients(with_lora(model), "padded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_that_differs_is_noticed(monkeypatch, dtype):
    model = tiny("llama", initializer_range=0.1).to(dtype)
    assert choose_way(model, some_sequences(), 32).way == "packed"
    monkeypatch.setattr(
        "tasks.models.workers.tree_attention.CpuAttention.apply", lambda query, *_: query.transpose(1, 2)
    )
    scoring = choose_way(model, some_sequences(), 32)
    assert scoring == Scoring("padded", scoring.reason)
    assert "differ" in scoring.reason


@pytest.mark.parametrize(("dtype", "way"), [(torch.bfloat16, "packed"), (torch.float32, "padded")])
def test_one_token_that_rounding_moves_by_0_3_nats_is_no_other_forward_in_bf16(monkeypatch, dtype, way):
    def moved(model, batch):
        losses = scored_losses(model, batch)
        return losses + 0.3 * (torch.arange(len(losses)) == 2) if "tree" in batch else losses

    monkeypatch.setattr("tasks.models.workers.scoring.scored_losses", moved)
    assert choose_way(tiny("llama").to(dtype), some_sequences(), 32).way == way


def test_a_model_that_changes_its_logits_is_scored_from_its_logits():
    model = tiny("granite", logits_scaling=8.0)
    batch = to_tensors(some_sequences())
    expected = torch.nn.functional.cross_entropy(scored_logits(model, batch), batch["labels"], reduction="none")
    torch.testing.assert_close(scored_losses(model, batch), expected)


def test_activation_checkpointing_changes_no_gradient():
    tuned = with_lora(tiny("llama"))
    fuse_lora(tuned)
    fuse_mlp(tuned)
    _, wanted = gradients(tuned, "packed")
    tuned.enable_input_require_grads()
    tuned.activation_checkpointing_enable({"use_reentrant": False})
    tuned.train()
    _, found = gradients(tuned, "packed")
    torch.testing.assert_close(found, wanted)


def test_dropout_works_in_training_and_only_there():
    tuned, batch = with_lora(tiny("llama"), dropout=0.5), to_tensors(some_sequences())
    expected = scored_losses(tuned.eval(), batch)
    assert fuse_lora(tuned) == 14
    assert fuse_mlp(tuned) == 2
    torch.testing.assert_close(scored_losses(tuned, batch), expected)
    dropped = scored_losses(tuned.train(), batch)
    assert (dropped - expected).abs().max() > 1e-3


def test_losses_in_blocks_are_those_of_all_logits_at_once(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 8), torch.randn(30, 8), torch.randint(30, (50,))
    results = []
    for block in ((7, 11), (2048, 2048)):
        set_block(monkeypatch, *block)
        own = hidden.clone().requires_grad_()
        (HeadLoss.apply(own, weight, targets) * torch.arange(50)).sum().backward()
        results.append(own.grad)
    plain = hidden.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(plain @ weight.T, targets, reduction="none")
    (losses * torch.arange(50)).sum().backward()
    for found in results:
        torch.testing.assert_close(found, plain.grad, rtol=1e-5, atol=1e-5)
