"""A preset, a file and `--set` make one spec; what is wrong in them is reported all at once, in plain words."""

import string
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from data_contracts.data_spec import DataSpec
from data_contracts.errors import ConfigError, Problem
from data_contracts.run_spec import RunSpec
from data_contracts.train_spec import TrainSpec
from flows.config.load import load_changes, load_spec, load_store, write_spec
from flows.config.validation_errors import all_settings


def problems(preset: str | None, *changes: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_spec(preset, list(changes))
    return list(caught.value.problems)


def one_problem(preset: str | None, *changes: str) -> Problem:
    (problem,) = problems(preset, *changes)
    return problem


def written(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_preset_means_demo():
    assert load_spec(None, []).spec == load_spec("demo", []).spec


def test_set_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    loaded = load_spec(written(tmp_path, "train:\n  rank: 4\n  alpha: 8\n"), ["train.alpha=12"])
    assert (loaded.spec.train.rank, loaded.spec.train.alpha, loaded.spec.train.seeds) == (4, 12, TrainSpec().seeds)
    origins = loaded.origins
    assert (origins["train.rank"], origins["train.alpha"], origins["train.seeds"]) == ("my.yaml:2", "--set", "default")


def test_the_store_may_be_under_home():
    assert load_store(["store.root=~/runs"]).root == str(Path("~/runs").expanduser())


def test_every_setting_has_an_origin():
    assert list(load_spec("smoke", []).origins) == list(all_settings())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.source=a.jsonl", ["a.jsonl"]),
        ("data.source=data/*.jsonl", ["data/*.jsonl"]),
        ("data.source=*.jsonl", ["*.jsonl"]),
        ("data.source=[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("data.delimiter=;", ";"),
        ("data.delimiter=|", "|"),
        ("data.delimiter=,", ","),
        ('data.delimiter="\\t"', "\t"),
        ("data.system_prompt=null", None),
        ("data.system_prompt=", None),
        ("data.system_prompt=Be brief: no lists.", "Be brief: no lists."),
        ("data.max_lookup_rows=null", None),
        ("model.name=007", "007"),
        ("train.learning_rate=5e-4", 5e-4),
        ("train.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("train.target_modules=all-linear", "all-linear"),
        ("train.activation_checkpointing=true", True),
        ("contract.max_quarantine_rate=0.2", 0.2),
        ("store.root=/somewhere/else", "/somewhere/else"),
    ],
)
def test_set_reads_values_as_a_person_means_them(change, expected):
    section, field = change.partition("=")[0].split(".")
    assert getattr(getattr(load_spec("demo", [change]).spec, section), field) == expected


def test_set_fills_a_mapping_entry_by_entry():
    changes = ["data.columns.prompt=question", "data.columns.completion=the.answer"]
    assert load_spec("demo", changes).spec.data.columns == {"prompt": "question", "completion": "the.answer"}


def test_set_takes_a_mapping_as_a_whole_and_seeds_and_variants_survive_being_written(tmp_path):
    assert load_spec("demo", ["data.columns={prompt: q, completion: a}"]).spec.data.columns == {
        "prompt": "q",
        "completion": "a",
    }
    changes = ["train.seeds=[1, 2]", "train.variants=[{name: r64, method: qlora, settings: {rank: 64, alpha: 128}}]"]
    changes += ["rules.custom=[{name: no_urls, forbidden: 'https?:'}]", "rules.actions={refusal: quarantine}"]
    spec = load_spec("demo", changes).spec
    write_spec(tmp_path / "written.yaml", spec, "tunegate run written.yaml")
    assert load_spec(str(tmp_path / "written.yaml"), []).spec == spec
    assert spec.train.variants[0].settings == {"rank": 64, "alpha": 128}


def test_a_gate_without_its_task_is_reported_with_the_settings_that_clash():
    problem = one_problem("smoke", "gates.max_forgetting_nats=0.1")
    assert "gates.max_forgetting_nats (--set)" in problem.where
    assert "needs general_nll in evaluate.tasks" in problem.limit


def test_a_set_entry_keeps_the_others_of_the_file(tmp_path):
    path = written(tmp_path, "data:\n  columns: {prompt: q, completion: a}\n")
    assert load_spec(path, ["data.columns.prompt=question"]).spec.data.columns == {
        "prompt": "question",
        "completion": "a",
    }


def test_a_single_string_is_a_list_of_one_in_yaml(tmp_path):
    assert load_spec(written(tmp_path, "data:\n  source: a.jsonl\n"), []).spec.data.source == ["a.jsonl"]


def test_an_empty_file_and_an_empty_section_mean_defaults(tmp_path):
    assert load_spec(written(tmp_path, "# nothing\n"), []).spec == RunSpec()
    assert load_spec(written(tmp_path, "train:\n"), []).spec == RunSpec()


# --- what is wrong ------------------------------------------------------------------------------------------


def test_an_unknown_preset_names_the_presets_and_the_closest():
    problem = one_problem("demoo")
    assert "'demoo'" in problem.what
    assert "demo, smoke" in problem.limit
    assert "did you mean demo?" in problem.act


def test_a_missing_file_is_named():
    assert one_problem("no/such.yaml").where == "no/such.yaml"


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.rnk", "train.rank"),
        ("learning_rate", "train.learning_rate"),
        ("tran.rank", "train.rank"),
        ("modle.name", "model.name"),
        ("data.retention", "gates.min_retention"),
    ],
)
def test_an_unknown_key_names_the_closest(key, meant):
    problem = one_problem("demo", f"{key}=3")
    assert repr(key) in problem.what
    assert problem.act == f"did you mean {meant}?"


def test_a_section_is_no_setting():
    assert "train.rank" in one_problem("demo", "train=3").act


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ("train.rank=0", "at least 1"),
        ("train.rank=8.5", "a whole number"),
        ("train.rank=true", "a whole number"),
        ("train.rank=eight", "a whole number"),
        ("train.dropout=1.0", "less than 1.0"),
        ("train.learning_rate=0", "more than 0.0"),
        ("train.learning_rate=fast", "a number"),
        ("train.learning_rate=.inf", "a finite number"),
        ("contract.max_quarantine_rate=1.5", "at most 1.0"),
        ("contract.max_quarantine_rate=.nan", "a finite number"),
        ("train.activation_checkpointing=yes", "true or false"),
        ("train.methods=[lora, qlra]", "one of 'lora', 'qlora', 'full' or 'prefix'"),
        ("train.methods=[]", "at least 1 item"),
        ("data.delimiter=;;", "text that matches ^(auto|.)$"),
        ("data.columns=[a]", "a mapping, such as {prompt: question, completion: answer}"),
        ("model.name=a/b", "text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ],
)
def test_a_wrong_value_is_reported_with_its_key_its_value_and_the_limit(change, limit):
    key, _, value = change.partition("=")
    found = problems("demo", change)
    assert limit in [problem.limit for problem in found]
    assert all(problem.where == "--set" and key in problem.what for problem in found)
    assert any(value.strip("[]").split(", ")[-1].lstrip(".") in problem.what for problem in found)


def test_a_set_without_equals_says_how_to_write_one():
    assert "train.rank=8" in one_problem("demo", "train.rank").act


def test_settings_that_do_not_fit_together_are_reported():
    problem = one_problem("demo", "curate.test_fraction=0.99", "curate.validation_fraction=0.5")
    assert "curate.test_fraction (--set)" in problem.where
    assert "no row would be left to train on" in problem.limit


def test_everything_wrong_is_reported_at_once(tmp_path):
    path = written(tmp_path, "train:\n  rnk: 4\n  alpha: none\ntrian:\n  rank: 1\ndata: 3\n")
    found = problems(path, "train", "train.rank=0", "foo=1")
    assert {problem.where for problem in found} == {"my.yaml:2", "my.yaml:3", "my.yaml:4", "my.yaml:6", "--set"}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("train:\n  rank: 4\n  rank: 5\n", "my.yaml:3", 'duplicate key "rank"'),
        ("data:\n  source: *.jsonl\n", "my.yaml:2", "is not YAML"),
        ("train: [1\n", "my.yaml:2", "is not YAML"),
        ("- a\n", "my.yaml", "holds a list"),
    ],
)
def test_broken_yaml_is_reported_with_its_line(tmp_path, text, where, what):
    problem = one_problem(written(tmp_path, text))
    assert problem.where.endswith(where)
    assert what in problem.what


def test_a_file_that_is_not_utf8_is_reported(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes("model:\n  name: Größe\n".encode("utf-16"))
    assert "UTF-8" in one_problem(str(path)).limit


def test_commands_that_read_the_store_refuse_other_settings():
    assert load_store(["store.root=/x"]).root == "/x"
    with pytest.raises(ConfigError, match=r"train\.rank has no effect here"):
        load_store(["train.rank=3"])


# --- writing ------------------------------------------------------------------------------------------------


def test_what_is_written_loads_back_and_explains_every_setting(tmp_path):
    spec = load_spec("demo", ["data.columns.prompt=q", "data.columns.completion=a", "train.max_steps=3"]).spec
    path = tmp_path / "new" / "my.yaml"
    write_spec(path, spec, "tunegate run my.yaml\n\nSecond line.")
    loaded = load_spec(str(path), [])
    assert loaded.spec == spec
    assert set(loaded.origins.values()).isdisjoint({"default", "--set"})
    text = path.read_text()
    assert text.startswith("# tunegate run my.yaml\n")
    unwrapped = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    explained = [" ".join(setting.description.split()) for setting in all_settings().values() if setting.description]
    assert len(explained) == len(all_settings())
    assert all(description in unwrapped for description in explained)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.text(string.punctuation, min_size=1)


@settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.generate])
@example("...", {"...": "-", "a": "..."}, 1.0)
@given(TEXT, st.dictionaries(TEXT, TEXT, max_size=2), st.floats(1e-9, 1e3))
def test_any_text_survives_being_written(tmp_path_factory, text, columns, rate):
    data = DataSpec(source=[text, text], columns=columns, system_prompt=text)
    spec = RunSpec(data=data, train=TrainSpec(learning_rate=rate))
    path = tmp_path_factory.mktemp("spec") / "my.yaml"
    write_spec(path, spec, "head")
    assert load_spec(str(path), []).spec == spec


def test_an_existing_file_is_left_alone(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_spec(path, RunSpec(), "head")
    assert path.read_text() == "mine"


def test_changes_alone_start_from_the_defaults():
    assert load_changes(["train.rank=3"]) == RunSpec(train=TrainSpec(rank=3))
