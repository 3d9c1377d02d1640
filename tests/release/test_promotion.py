"""Promote, roll back, audit: who may become champion, what is kept of it, who wins, what a kill leaves.

    pytest tests/release/test_promotion.py             # `-m slow`: killed with SIGKILL before every single write

The registry, its versions, the processes and their deaths are real; adapters are random on a tiny base.
"""

import hashlib
import json
import multiprocessing
import signal
import sys
from pathlib import Path

import pytest

from data_contracts.errors import ConfigError, GateError, StoreError, TransientError
from data_contracts.jobs.release import CheckReleaseJob
from data_contracts.releases import OVERRIDE_TAG, Move
from data_contracts.reports import ReleaseCheck, SampleAnswer
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import Decision, GateReport
from flows.cli.pages.release import show_history
from flows.services.status import read_status
from tasks.release import history, promotion
from tasks.release import promotion_ledger as ledgers
from tasks.release.champion import champion_baseline
from tasks.release.judgements import keep_judgement
from tasks.release.promotion import Approval, promote_version
from tasks.release.registry import CHAMPION, alias_version, champion, resolve
from tasks.runtime.console import page
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store
from tests.support.planted import planted
from tests.support.releases import NAME, Registry, evaluation, promote_and_die, rollback_version, try_to_promote

pytestmark = pytest.mark.filterwarnings("ignore")


# --- the ledger ---------------------------------------------------------------------------------------------


def move(number: int, act: str = "promote") -> Move:
    return Move(
        id=f"m{number}", name=NAME, act=act, before=str(number - 1), to=str(number), who="anna@host", run=None,
        unix_seconds=float(number), why="because", overrode=[], evidence=None,
    )  # fmt: skip


@pytest.fixture
def written(tmp_path) -> Store:
    """Three moves, each intended and done."""
    store = Store(tmp_path)
    with ledgers.opened(store) as ledger:
        for number in (1, 2, 3):
            ledger.write("intended", move(number))
            ledger.write("done", move(number))
    return store


def file_of(store: Store) -> Path:
    return store.files / ledgers.LEDGER_FILE


def test_what_was_written_is_read_again(written):
    ledger = ledgers.read(written)
    assert ledger.problem is None and ledger.unfinished == []
    assert [(entry.move, entry.step) for entry in ledger.of(NAME)] == [(move(n), "done") for n in (1, 2, 3)]


@pytest.mark.parametrize("number", range(6))
def test_a_line_that_was_changed_is_found(written, number):
    lines = file_of(written).read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace('"note":""', '"note":"nothing to see"')
    file_of(written).write_text("".join(lines))
    problem = ledgers.read(written).problem
    if number == 5:  # nothing follows it in the file: only the registry's tags show it
        assert problem is None
    else:
        assert f"line {number + 2}:" in problem and "the line before it was changed or taken out" in problem
        with pytest.raises(StoreError, match="--rebuild"), ledgers.opened(written):
            pass


@pytest.mark.parametrize("number", range(5))
def test_a_line_that_was_taken_out_is_found(written, number):
    lines = file_of(written).read_text().splitlines(keepends=True)
    file_of(written).write_text("".join(lines[:number] + lines[number + 1 :]))
    assert f"line {number + 1}:" in ledgers.read(written).problem


def test_what_is_no_line_of_a_ledger_is_found(written):
    with file_of(written).open("a") as file:
        file.write("{}\n")
    assert (
        "line 7" in ledgers.read(written).problem and "no line of a promotion ledger" in ledgers.read(written).problem
    )


def test_half_a_line_of_a_killed_process_is_taken_away(written):
    whole = file_of(written).read_text()
    with file_of(written).open("a") as file:
        file.write('{"after":"0000')
    assert ledgers.read(written).problem is None
    with ledgers.opened(written) as ledger:
        assert file_of(written).read_text() == whole
        ledger.write("intended", move(4))
    assert [one.id for one in ledgers.read(written).unfinished] == ["m4"]


def test_a_ledger_that_another_process_holds_is_waited_for_and_then_reported(written):
    refused = pytest.raises(TransientError, match="another process is moving a champion")
    with ledgers.opened(written), refused, ledgers.opened(written, wait_seconds=0):
        pass


@pytest.mark.parametrize(
    ("acts", "standing"),
    [
        ("p1 p2 p3", "1 2 3"),
        ("p1 p2 p3 r2", "1 2"),
        ("p1 p2 p3 r2 r1", "1"),
        ("p1 p2 r1 p3 r1", "1"),
        ("p1 p2 r1 p2", "1 2"),
        ("p3 p1 p3 r1", "1"),  # what was rolled back is not good, also where it was champion before
    ],
)
def test_the_champions_that_stand_are_those_that_were_not_rolled_back(acts, standing):
    done, before = [], None
    for number, act in enumerate(acts.split()):
        kind = {"p": "promote", "r": "rollback"}[act[0]]
        done.append(move(number, kind).model_copy(update={"before": before, "to": act[1]}))
        before = act[1]
    assert history.kept_champions(done) == standing.split()


# --- the registry -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tiny_base, tmp_path_factory) -> Registry:
    """Versions 1 to 4, by seed; 1 and 2 were compared with no champion, 3 with 1, and 4 failed."""
    found = Registry(tmp_path_factory.mktemp("moves"), tiny_base)
    found.version(1)
    found.version(2)
    found.version(3, compared_with=1)
    found.version(4, verdict="fail")
    return found


@pytest.fixture
def fresh(registry) -> Registry:
    """The same without any move."""
    client = connect(registry.store)
    if alias_version(client, NAME, CHAMPION):
        client.delete_registered_model_alias(NAME, CHAMPION)
    for key in client.get_registered_model(NAME).tags:
        client.delete_registered_model_tag(NAME, key)
    for version in client.search_model_versions(f"name = '{NAME}'"):
        if OVERRIDE_TAG in version.tags:
            client.delete_model_version_tag(NAME, version.version, OVERRIDE_TAG)
    file_of(registry.place).unlink(missing_ok=True)
    return registry


def now(registry: Registry) -> str | None:
    return alias_version(connect(registry.store), NAME, CHAMPION)


def steps(registry: Registry) -> list[tuple[str, str | None, str, str]]:
    entries = history.promotion_history(registry.store, NAME).entries
    return [(entry.move.act, entry.move.before, entry.move.to, entry.step) for entry in entries]


def test_a_promotion_is_kept_with_who_when_from_to_why_and_evidence(fresh, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTOR", "octocat")
    check = ReleaseCheck(
        questions=1, answered_alike=1, difference_nats=1e-6, tolerance_nats=1e-3, precision="fp32", ms_per_token=2.0,
        peak_bytes=10**9, seconds=3.0, refusals=[],
    )  # fmt: skip
    promote_version(fresh.store, NAME, "1", Approval(reason="token=hunter2 asked for it"), check=check)
    (entry,) = history.promotion_history(fresh.store, NAME).entries
    kept = entry.move
    assert (kept.act, kept.before, kept.to, entry.step) == ("promote", None, "1", "done")
    assert kept.who.startswith("octocat (CI, ") and kept.why == "token=... asked for it"
    assert kept.evidence.verdict == "pass" and kept.evidence.judged_in == "gate.json"
    assert kept.evidence.adapter_sha256 == fresh.adapter(1).sha256 and kept.evidence.check == check
    assert history.registry_moves(connect(fresh.store), NAME) == [kept]
    promote_version(fresh.store, NAME, "1")
    assert len(steps(fresh)) == 1, "it is champion already"


@pytest.mark.parametrize(
    ("version", "why"), [("4", "the gates of moves version 4 say fail"), ("2", "version 1 has become champion since")]
)
def test_a_version_is_refused_that_failed_or_stood_against_another_champion(fresh, version, why):
    promote_version(fresh.store, NAME, "1")
    with pytest.raises(GateError, match=why):
        promote_version(fresh.store, NAME, version)
    assert now(fresh) == "1" and len(steps(fresh)) == 1
    promote_version(fresh.store, NAME, "3")
    assert now(fresh) == "3"


def test_a_tag_alone_is_no_judgement(fresh):
    client = connect(fresh.store)
    client.set_model_version_tag(NAME, "4", "tunegate.verdict", "pass")
    with pytest.raises(GateError, match="say fail and pass: its tag and its report differ"):
        promote_version(fresh.store, NAME, "4")
    client.set_model_version_tag(NAME, "4", "tunegate.verdict", "fail")
    other = fresh.version(5, judgement_of=fresh.adapter(1))
    with pytest.raises(GateError, match=f"no gate report is kept for moves version {other}") as found:
        promote_version(fresh.store, NAME, other)
    assert found.value.problems[0].act == f"judge it: tunegate gate --model models:/moves/{other}"
    client.delete_model_version(NAME, other)


def decided(registry: Registry, version: str, verdict: str, against: int | None) -> None:
    """As `tunegate gate` keeps it."""
    named = resolve(registry.store, f"models:/{NAME}/{version}")
    comparison = planted(Path(registry.store.root)).comparison
    gate = GateReport(gates=[], off=[], verdict=verdict)
    decision = Decision(
        model=f"models:/{NAME}/{version}", name=NAME, version=version, champion=None, gate=gate, comparison=comparison
    )
    own = evaluation("candidate", named.adapter.sha256, [])
    keep_judgement(registry.store, named, registry.adapter(against).sha256 if against else None, decision, own)


def test_the_newest_judgement_of_a_version_counts(fresh):
    promote_version(fresh.store, NAME, "1")
    version = fresh.version(6)
    with pytest.raises(GateError, match="has become champion since"):
        promote_version(fresh.store, NAME, version)
    decided(fresh, version, "pass", against=1)
    assert [one.verdict for one in history.champions(fresh.store).standings] == ["pass", "pass"]
    decided(fresh, version, "fail", against=1)
    with pytest.raises(GateError, match=f"the gates of moves version {version} say fail"):
        promote_version(fresh.store, NAME, version)
    assert [one.verdict for one in history.champions(fresh.store).standings] == ["pass", "fail"]
    decided(fresh, version, "pass", against=1)
    promote_version(fresh.store, NAME, version)
    assert (
        history.promotion_history(fresh.store, NAME)
        .entries[-1]
        .move.evidence.judged_in.startswith(f"judgements/{version}-")
    )
    connect(fresh.store).delete_registered_model_alias(NAME, CHAMPION)
    connect(fresh.store).delete_model_version(NAME, version)


def test_an_override_needs_a_reason_and_is_shown_everywhere(fresh, capfd):
    promote_version(fresh.store, NAME, "1")
    with pytest.raises(ConfigError, match="--override without --reason"):
        promote_version(fresh.store, NAME, "4", Approval(override=True, reason=" "))
    promote_version(fresh.store, NAME, "4", Approval(override=True, reason="[b]we[/b] know better"))
    assert connect(fresh.store).get_model_version(NAME, "4").tags[OVERRIDE_TAG] == "[b]we[/b] know better"
    standing = history.champions(fresh.store).standings[0]
    assert (standing.version, standing.verdict, standing.override) == ("4", "fail", "[b]we[/b] know better")
    kept = history.promotion_history(fresh.store, NAME).entries[-1].move
    assert kept.overrode == [
        "the gates of moves version 4 say fail",
        "version 1 has become champion since moves version 4 was judged",
    ]
    base = Base(champion(fresh.store, NAME).base_digest)
    assert (
        champion_baseline(fresh.store, NAME, fresh.adapter(2), base).label == "moves version 4 (champion by override)"
    )
    show_history(history.promotion_history(fresh.store, NAME), page(sys.stdout))
    printed = capfd.readouterr().out
    assert "override" in printed and "[b]we[/b]" in " ".join(printed.split())
    rollback_version(fresh.store, NAME)
    assert history.champions(fresh.store).standings[0].override == ""


class Base:
    def __init__(self, digest: str) -> None:
        self.digest = digest


def test_rolled_back_twice_it_is_the_one_before_the_one_before_and_then_there_is_none(fresh):
    for version in ("1", "3", "2"):
        promote_version(fresh.store, NAME, version, Approval(override=version == "2", reason="of this test"))
    rollback_version(fresh.store, NAME)
    assert now(fresh) == "3"
    rollback_version(fresh.store, NAME)
    assert now(fresh) == "1"
    with pytest.raises(ConfigError, match="no champion before this one") as found:
        rollback_version(fresh.store, NAME)
    assert "tunegate promote moves --version N" in found.value.problems[0].act
    assert steps(fresh)[-2:] == [("rollback", "2", "3", "done"), ("rollback", "3", "1", "done")]


def test_a_version_that_is_gone_is_not_gone_back_to(fresh):
    gone = fresh.version(7, compared_with=1)
    for version in ("1", gone):
        promote_version(fresh.store, NAME, version)
    promote_version(fresh.store, NAME, "2", Approval(override=True, reason="of this test"))
    connect(fresh.store).delete_model_version(NAME, gone)
    rollback_version(fresh.store, NAME)
    assert now(fresh) == "1"


def test_an_alias_set_past_tunegate_is_reported_and_rolled_back(fresh):
    promote_version(fresh.store, NAME, "1")
    connect(fresh.store).set_registered_model_alias(NAME, CHAMPION, "4")
    (problem,) = history.promotion_history(fresh.store, NAME).problems
    assert "the champion is version 4, and the last move was to 1" in problem
    rollback_version(fresh.store, NAME)
    assert now(fresh) == "1" and history.promotion_history(fresh.store, NAME).problems == []


def test_a_changed_last_line_is_found_by_the_registry(fresh):
    promote_version(fresh.store, NAME, "1")
    lines = file_of(fresh.place).read_text().splitlines()
    intended = json.loads(lines[0])
    intended["move"]["who"] = "nobody"
    first = json.dumps(intended)
    done = json.loads(lines[1]) | {"after": hashlib.sha256(first.encode()).hexdigest()}  # chained again, and well
    file_of(fresh.place).write_text(f"{first}\n{json.dumps(done)}\n")
    assert ledgers.read(fresh.place).problem is None
    (problem,) = history.promotion_history(fresh.store, NAME).problems
    assert "the registry has another record of the promote to version 1" in problem


def test_moves_that_the_file_lost_are_reported_and_rebuilt_from_the_registry(fresh):
    promote_version(fresh.store, NAME, "1")
    promote_version(fresh.store, NAME, "3")
    whole = file_of(fresh.place).read_text().splitlines(keepends=True)
    file_of(fresh.place).write_text("".join(whole[:2]))  # a shorter chain is one too
    (problem,) = history.promotion_history(fresh.store, NAME).problems
    assert "it lacks 1 moves that the registry has" in problem and "--rebuild" in problem
    history.rebuild_ledger(fresh.store)
    assert history.promotion_history(fresh.store, NAME).problems == []
    assert steps(fresh) == [("promote", None, "1", "done"), ("promote", "1", "3", "done")]
    file_of(fresh.place).write_text(file_of(fresh.place).read_text().replace("gates: pass", "as we like"))
    history.rebuild_ledger(fresh.store)
    assert [entry.move.why for entry in history.promotion_history(fresh.store, NAME).entries] == ["gates: pass"] * 2
    file_of(fresh.place).write_text("nonsense\n")
    with pytest.raises(StoreError, match="the promotion ledger was changed"):
        rollback_version(fresh.store, NAME)
    assert now(fresh) == "3"
    assert "restore the file" in history.promotion_history(fresh.store, NAME).problems[0]
    history.rebuild_ledger(fresh.store)
    rollback_version(fresh.store, NAME)
    assert now(fresh) == "1" and len(list(fresh.place.files.glob("promotions.jsonl.1*"))) >= 3


def test_two_stores_on_one_registry_see_each_others_moves(fresh, tmp_path):
    uri = fresh.place.database_uri
    here = fresh.store.model_copy(update={"mlflow_uri": uri})
    there = StoreSpec(root=str(tmp_path), mlflow_uri=uri)
    promote_version(here, NAME, "1")
    promote_version(there, NAME, "3")
    found = history.promotion_history(there, NAME)
    assert [(entry.move.to, entry.elsewhere) for entry in found.entries] == [("1", True), ("3", False)]
    assert found.problems == [] and history.promotion_history(here, NAME).problems == []
    rollback_version(here, NAME)
    assert now(fresh) == "1"
    plan = promotion.plan_promotion(there, NAME, "3")
    promote_version(here, NAME, "2", Approval(override=True, reason="of this test"))
    with pytest.raises(GateError, match="version 2 has become champion since moves version 3 was judged"):
        promotion.carry_out(there, plan, None)


# --- several at once, and killed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported MLflow, and nothing of this one's."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["mlflow", "tasks.release.promotion", "tests.support.releases"])
    return found


def test_of_several_promoters_exactly_one_wins_and_the_others_say_who(fresh, processes):
    start, ends_of = processes.Barrier(3), processes.Queue()
    found = [
        processes.Process(target=try_to_promote, args=(fresh.store.root, version, start, ends_of))
        for version in ("1", "2", "3")
    ]
    for one in found:
        one.start()
    ends = dict(ends_of.get(timeout=120) for _ in found)
    for one in found:
        one.join()
    (winner,) = [version for version, end in ends.items() if end == "won"]
    assert now(fresh) == winner and steps(fresh) == [("promote", None, winner, "done")]
    for version in ends.keys() - {winner}:
        assert f"version {winner} has become champion since moves version {version} was judged, by " in ends[version]


def killed(processes, registry: Registry, version: str, write: int, torn: bool = False) -> None:
    victim = processes.Process(target=promote_and_die, args=(registry.store.root, version, write, torn))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL


def is_consistent(registry: Registry) -> None:
    """Alias, ledger and registry say the same, every move is ended, and none is there twice."""
    found = history.promotion_history(registry.store, NAME)
    done = [entry.move for entry in found.entries if entry.step == "done"]
    assert found.problems == []
    assert all(entry.step in ("done", "undone") for entry in found.entries)
    assert now(registry) == (done[-1].to if done else None)
    assert [one.before for one in done] == [None, *(one.to for one in done[:-1])][: len(done)]
    assert [one.id for one in history.registry_moves(connect(registry.store), NAME)] == [one.id for one in done]


BEFORE, ALIAS, TAG, END = range(4)
DEATHS = [(BEFORE, False), (BEFORE, True), (ALIAS, False), (TAG, False), (END, False), (END, True)]


def bytes_of(registry: Registry) -> dict[str, str]:
    """sha256 of the ledger and of the registry's database."""
    files = [file_of(registry.place), registry.place.root / "mlflow.db"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_query_shows_what_a_killed_move_left_as_unfinished_and_changes_no_byte(fresh, processes, capfd):
    promote_version(fresh.store, NAME, "1")
    killed(processes, fresh, "3", TAG)
    before = bytes_of(fresh)
    line = "the promotion of moves to version 3 is unfinished: the next promote, rollback or retrain ends it"
    found = history.promotion_history(fresh.store, NAME)
    assert (found.champion, found.entries[-1].step, found.unfinished, found.problems) == ("3", "intended", [line], [])
    show_history(found, page(sys.stdout))
    assert "promote, unfinished" in " ".join(capfd.readouterr().out.split())
    assert history.champions(fresh.store).unfinished == [line]
    status = read_status(fresh.store)
    assert status.unfinished == [line] and status.models[0].version == "3"
    assert champion_baseline(fresh.store, NAME, fresh.adapter(2), Base("b")).version == "3"
    assert bytes_of(fresh) == before
    rollback_version(fresh.store, NAME)
    is_consistent(fresh)
    assert now(fresh) == "1" and history.champions(fresh.store).unfinished == []
    assert steps(fresh) == [
        ("promote", None, "1", "done"), ("promote", "1", "3", "done"), ("rollback", "3", "1", "done"),
    ]  # fmt: skip


def dies(processes, fresh: Registry, write: int, torn: bool) -> None:
    promote_version(fresh.store, NAME, "1")
    killed(processes, fresh, "3", write, torn)
    lines = history.reconcile(fresh.store)
    is_consistent(fresh)
    took = write > ALIAS
    assert now(fresh) == ("3" if took else "1")
    assert [("complete now" in line, "nothing was moved" in line) for line in lines] == (
        [] if write == BEFORE else [(took, not took)]
    )
    promote_version(fresh.store, NAME, "3")
    is_consistent(fresh)
    assert [one for one in steps(fresh) if one[3] == "done"] == [
        ("promote", None, "1", "done"), ("promote", "1", "3", "done"),
    ]  # fmt: skip
    assert history.reconcile(fresh.store) == []


@pytest.mark.parametrize(("write", "torn"), [(ALIAS, False), (TAG, False)])
def test_killed_in_a_move_the_next_start_ends_it(fresh, processes, write, torn):
    dies(processes, fresh, write, torn)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "torn"), [death for death in DEATHS if death not in [(ALIAS, False), (TAG, False)]])
def test_killed_before_or_within_any_write_the_next_start_ends_it(fresh, processes, write, torn):
    dies(processes, fresh, write, torn)


def test_a_promotion_ends_what_a_killed_one_left(fresh, processes):
    killed(processes, fresh, "1", TAG)
    with pytest.raises(GateError, match="version 1 has become champion since"):
        promote_version(fresh.store, NAME, "2", compared_with="none")
    promote_version(fresh.store, NAME, "3")
    is_consistent(fresh)


# --- the check ----------------------------------------------------------------------------------------------


QUESTION = "What comes after 7?"


@pytest.fixture(scope="module")
def answered(registry) -> SampleAnswer:
    """As the evaluation keeps it of the first adapter."""
    from peft import PeftModel

    from tasks.models.workers.chat_template import load_chat
    from tasks.models.workers.generation import likeliest, next_log_probabilities, write_batch
    from tasks.models.workers.loading import load_base
    from tasks.runtime.workers.device import choose_device

    chat, base = load_chat(registry.base), load_base(registry.base, "lora", choose_device("fp32", 1))
    model = PeftModel.from_pretrained(base, str(registry.place.path(registry.adapter(1).folder))).eval()
    prompt = chat.prompt([{"role": "user", "content": QUESTION}])
    nats_V = next_log_probabilities(model, chat.encode(prompt), chat.stop_ids[0])
    (written,) = write_batch(model, chat, [chat.encode(prompt)], 8)
    return SampleAnswer(
        question=QUESTION, reference="8", answer=written.text, prompt=prompt, next_tokens=likeliest(nats_V)
    )


@pytest.fixture
def check_here(registry, monkeypatch):
    """The check's own worker, in this process: a fresh one is what tests/flows/test_chain.py has."""
    from tasks.release import release_check
    from tasks.release.workers import check_release as worker

    def here(module: str, job: CheckReleaseJob, out: Path, *_: object) -> dict:
        out.mkdir(parents=True)
        return worker.compare_with_evaluation(job, out)

    monkeypatch.setattr(release_check, "run_worker", here)
    monkeypatch.setenv("TUNEGATE_STORE_DIR", registry.store.root)

    def check(version: str, sample: SampleAnswer, **limits: float) -> ReleaseCheck:
        settings = release_check.ReleaseLimits(8, **limits)
        return release_check.check_release(
            registry.store, resolve(registry.store, f"models:/{NAME}/{version}"), [sample], "fp32", settings
        ).check

    return check


def test_what_was_evaluated_is_distinguished_from_another_adapter(answered, check_here):
    same = check_here("1", answered)
    assert (same.refusals, same.answered_alike, same.questions) == ([], 1, 1)
    assert same.difference_nats < 1e-4 and same.ms_per_token > 0 and same.peak_bytes > 1e8
    other = check_here("3", answered)
    assert other.difference_nats > 0.01
    assert "it is not the model that was evaluated" in other.refusals[0]


def test_a_check_refuses_what_is_slow_or_large_or_cannot_be_compared(answered, check_here):
    blind = answered.model_copy(update={"next_tokens": None})
    found = check_here("1", blind, max_ms_per_token=1e-6, max_memory_gb=1e-3)
    assert [line.split(":")[0].split(",")[-1].strip() for line in found.refusals] == [
        "its evaluation kept no log-probabilities to compare with",
        "gates.max_ms_per_token is 1e-06",
        "gates.max_memory_gb is 0.001",
    ]


def test_a_refused_check_moves_nothing_unless_it_is_overruled(fresh, answered, check_here):
    check = check_here("3", answered)
    with pytest.raises(GateError, match="not the model that was evaluated") as found:
        promote_version(fresh.store, NAME, "3", check=check)
    assert found.value.problems[0].act.endswith('tunegate promote moves --version 3 --override --reason "why"')
    assert now(fresh) is None and steps(fresh) == []
    promote_version(fresh.store, NAME, "3", Approval(override=True, reason="the evaluation is lost"), check=check)
    assert now(fresh) == "3" and history.champions(fresh.store).standings[0].override == "the evaluation is lost"


def test_a_plan_sees_nothing_against_the_champion_itself(fresh):
    promote_version(fresh.store, NAME, "4", Approval(override=True, reason="of this test"))
    plan = promotion.plan_promotion(fresh.store, NAME, "4")
    assert plan.is_done and plan.against == ()
