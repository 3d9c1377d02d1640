"""Workers on a tiny real model: exact losses and gradients, exact resume, the same scores as lm-eval's own class.

Run: pytest tests/training/test_workers.py
"""

import json
import time
from pathlib import Path

import pytest
import torch

from data_contracts.errors import ConfigError, DataError
from data_contracts.jobs.evaluation import BenchmarkItemsJob
from data_contracts.jobs.models import PrepareBaseJob
from data_contracts.jobs.training import TrainJob
from data_contracts.run_spec import EvaluateSpec
from tasks.evaluation.evaluate import task_files
from tasks.models.core.packing import ScoredSequence
from tasks.models.workers.chat_template import load_chat
from tasks.models.workers.fused_layers import fuse_lora
from tasks.models.workers.loading import load_base, weights_bytes
from tasks.models.workers.prepare_base import prepare
from tasks.models.workers.scoring import choose_way, scored_losses, to_tensors
from tasks.runtime.processes import run_worker
from tasks.training.workers.training_rows import check_batch, encode_rows
from tests.conftest import step0_job, toy_rows, write_rows
from tests.support.devices import CPU
from tests.support.faults import changed, job_on


@pytest.fixture(scope="module")
def step0(tiny_base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("step0")
    run_worker("tasks.models.workers.init_adapter", step0_job(tiny_base, dropout=0.1), out)
    return out / "adapter"


@pytest.fixture(scope="module")
def job(tiny_base, step0, tmp_path_factory) -> TrainJob:
    job = job_on(tiny_base, tmp_path_factory.mktemp("rows"), step0=step0, max_steps=None)
    write_rows(job.train, toy_rows(80))
    write_rows(job.validation, toy_rows(6, first=200))
    return job


# --- exactness ----------------------------------------------------------------------------------------------


def padded_reference(model, rows: list[ScoredSequence]) -> torch.Tensor:
    """Each row alone through the plain Hugging Face forward: no packing, all logits."""
    losses = []
    for row in rows:
        ids = torch.tensor([list(row.ids)])
        logits = model(input_ids=ids).logits[0, row.start - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, row.start :], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_packed_losses_and_gradients_equal_the_reference(tiny_base, step0, method):
    from peft import PeftModel

    chat = load_chat(tiny_base)
    rows = [chat.scored(row["messages"]) for row in toy_rows(7)]
    model = PeftModel.from_pretrained(load_base(tiny_base, method, CPU), step0, is_trainable=True).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # at step 0 B is zero and hides errors in A's gradient
            torch.nn.init.normal_(parameter, std=0.1)
    assert choose_way(model, rows, 256).way == "packed"  # a forward without gradients changes no weight
    gradients = []
    for losses_of in (padded_reference, lambda model, rows: scored_losses(model, to_tensors(rows))):
        model.zero_grad()
        losses = losses_of(model, rows)
        losses.mean().backward()
        gradients.append((losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert gradients[1:] or fuse_lora(model) == 14  # seven in each of two layers, for the second way
    (expected, expected_grads), (losses, grads) = gradients
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert len(grads) == len(expected_grads) > 0
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-9


def test_lm_eval_scores_are_those_of_its_own_class(tiny_base):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tasks.evaluation.workers.packed_lm import PackedLM

    chat = load_chat(tiny_base)
    model = load_base(tiny_base, "lora", CPU)
    pairs = [(f"Message {i // 4}\nTopic:", f" number {i}") for i in range(12)] + [("", "alone"), ("x " * 400, " far")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    ours = PackedLM(model, chat, batch_tokens=64, max_length=256, name="test", way="packed").loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=4, max_length=256).loglikelihood(requests)
    assert len(ours) == len(pairs)
    for (own, own_greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=1e-4)
        assert own_greedy == other_greedy


def test_evaluation_reads_the_very_tokens_that_training_saw(tiny_base):
    from tasks.evaluation.workers.packed_lm import PackedLM

    chat = load_chat(tiny_base)
    lm = PackedLM(load_base(tiny_base, "lora", CPU), chat, batch_tokens=64, max_length=256, name="test", way="packed")
    for row in toy_rows(5):
        scored = chat.scored(row["messages"])
        context, continuation = lm._encode_pair(*chat.split(row["messages"]))
        assert [*context, *continuation] == scored.ids
        assert len(context) == scored.start


def test_the_base_takes_less_memory_in_nf4(tiny_base):
    full, quantised = (weights_bytes(load_base(tiny_base, method, CPU)) for method in ("lora", "qlora"))
    assert quantised < full / 2


# --- rows ---------------------------------------------------------------------------------------------------


def test_an_answer_ends_with_its_stop_token(tiny_base):
    chat = load_chat(tiny_base)
    row = chat.scored(toy_rows(1)[0]["messages"])
    check_batch(chat, [row])
    assert row.ids[-1] in chat.stop_ids
    with pytest.raises(DataError, match="without a stop token"):
        check_batch(chat, [ScoredSequence(row.ids[:-1], row.start)])


def test_a_template_that_ends_no_answer_is_refused(tiny_base):
    chat = load_chat(tiny_base)
    chat.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ConfigError, match="stop tokens"):
        chat.scored(toy_rows(1)[0]["messages"])


def test_rows_that_are_too_long_are_listed_not_cut(tiny_base, tmp_path):
    rows = toy_rows(3)
    rows[1]["messages"][1]["content"] = "long " * 100
    file = write_rows(tmp_path / "rows", rows)
    kept, row_ids = encode_rows(load_chat(tiny_base), file, 200, "leave_out", tmp_path / "left_out")
    (left_out,) = (json.loads(line) for line in (tmp_path / "left_out").read_text().splitlines())
    assert len(kept) == len(row_ids) == 2
    assert left_out["line"] == 2
    assert left_out["tokens"] > left_out["limit"] == 200


@pytest.mark.parametrize(("policy", "sequences"), [("truncate", 1), ("split", 6)])
def test_a_row_that_is_too_long_is_cut_as_asked_and_listed(tiny_base, tmp_path, policy, sequences):
    rows = toy_rows(3)
    rows[1]["messages"][1]["content"] = "long " * 100
    file = write_rows(tmp_path / "rows", rows)
    kept, row_ids = encode_rows(load_chat(tiny_base), file, 200, policy, tmp_path / "long")
    (listed,) = (json.loads(line) for line in (tmp_path / "long").read_text().splitlines())
    assert (listed["line"], listed["policy"], listed["sequences"]) == (2, policy, sequences)
    assert len(kept) == 2 + sequences
    assert row_ids.count(rows[1]["row_id"]) == sequences
    assert max(len(row.ids) for row in kept) <= 200


# --- tasks of the user's own --------------------------------------------------------------------------------

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{label}}}}"
"""


@pytest.fixture
def colours(tmp_path) -> Path:
    """A folder with one lm-eval task of two questions."""
    items = [{"question": f"Which colour has thing {i}?", "options": ["red", "blue"], "label": i} for i in range(2)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "colours.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    return tmp_path


def test_items_of_the_users_own_tasks_are_compared_with_training_rows(colours, tmp_path):
    job = BenchmarkItemsJob(tasks=["colours"], task_folder=str(colours))
    assert run_worker("tasks.evaluation.workers.benchmark_items", job, tmp_path / "out") == {"items": 2}
    first, second = map(json.loads, (tmp_path / "out" / "items.jsonl").read_text().splitlines())
    assert first == {"kind": "colours", "name": "colours:1", "text": "Which colour has thing 0?"}
    assert second["name"] == "colours:2"


def test_a_changed_task_file_is_another_task(colours):
    spec = EvaluateSpec(task_folder=str(colours))
    before = task_files(spec)
    (colours / "colours.yaml").write_text("task: other")
    assert task_files(spec).sha256 != before.sha256
    with pytest.raises(ConfigError, match="no task file in"):
        task_files(EvaluateSpec(task_folder=str(colours / "nowhere")))


# --- whole workers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory) -> Path:
    """An arm trained without a break."""
    out = tmp_path_factory.mktemp("whole")
    assert run_worker("tasks.training.workers.train_adapter", job, out)["resumed_from_step"] == 0
    return out


def test_a_worker_that_has_ended_well_is_not_run_again(job, whole):
    started = time.time_ns()
    run_worker("tasks.training.workers.train_adapter", job, whole)
    assert (whole / "report.json").stat().st_mtime_ns < started


def test_a_wrong_input_comes_back_as_the_error_it_is(job, tmp_path):
    with pytest.raises(DataError, match="no row is short enough"):
        run_worker("tasks.training.workers.train_adapter", changed(job, max_tokens=16), tmp_path)


def test_a_base_that_is_nowhere_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="go online once"):
        prepare(PrepareBaseJob(base="nobody/nothing", revision=None), tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        prepare(PrepareBaseJob(base="./nowhere", revision=None), tmp_path)
    with pytest.raises(ConfigError, match="no such built-in base"):
        prepare(PrepareBaseJob(base="builtin:nothing", revision=None), tmp_path)


def test_pickled_weights_are_refused(tiny_base, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_base / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="pickled ones are refused"):
        prepare(PrepareBaseJob(base=str(folder), revision=None), tmp_path / "out")
