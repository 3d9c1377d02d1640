"""A registered version answers OpenAI's own client, and another takes its place while it does. Run: pytest tests/serving/test_serving.py

One real server process over a tiny base with planted adapters, for all tests of this file. The slow tests run the commands over a real registry.
"""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_contracts.errors import ConfigError
from data_contracts.jobs.serving import Assignment, RequestLimits, ServedVersion, ServeJob
from data_contracts.releases import Pair, ShadowAnswer
from data_contracts.run_spec import StoreSpec
from flows.cli.chat import ChatSession
from tasks.runtime.store import digest
from tasks.serving.endpoint import Endpoint, ModelName, parse_model_name
from tasks.serving.shadow import compare_pairs
from tasks.serving.workers.generation import StopStringTrimmer
from tests.support.servers import COMMAND, Server, free_port, prefect_server

SYSTEM = "Answer in numbers."
QUESTION = {"role": "user", "content": "What comes after 3?"}
KEY = "a key of this test"
LIMITS = RequestLimits(prompt_tokens=400, answer_tokens=500, requests=3)


# --- what is served -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base without words for what cannot be printed: its answers are ASCII."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("printable")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), AutoModelForCausalLM.from_pretrained(tiny_base)
    printable = {tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)}
    words = model.get_input_embeddings().weight.data
    words[[row for row in range(len(words)) if row not in printable]] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planted(folder: Path, base: Path, version: int, method: str = "lora") -> ServedVersion:
    """A version as the registry names it, with an adapter that says something of its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tasks.models.workers.chat_template import load_chat
    from tasks.models.workers.loading import load_base
    from tests.support.devices import CPU

    torch.manual_seed(version + 1)
    model = get_peft_model(
        load_base(base, "lora", CPU), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder / "adapter")
    quantisation = {"quant_type": "nf4", "double_quant": True} if method == "qlora" else None
    meta = {
        "base": "builtin:printable", "base_digest": digest(base), "base_path": "nowhere", "base_revision": None,
        "method": method, "quantisation": quantisation, "precision": "fp32", "system_prompt": SYSTEM,
        "stops": load_chat(base).stops, "chat_template": None,
        "adapter_files": {file.name: digest(file) for file in (folder / "adapter").iterdir()},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return ServedVersion(
        name="demo", version=str(version), alias="champion", adapter_folder=str(folder / "adapter"),
        meta_file=str(folder / "meta.json"), adapter_sha256=digest(folder / "adapter" / "adapter_model.safetensors"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def versions(base, tmp_path_factory) -> dict[int, ServedVersion]:
    place = tmp_path_factory.mktemp("versions")
    return {number: planted(place / str(number), base, number) for number in (1, 2)} | {
        3: planted(place / "3", base, 3, "qlora")
    }


def evaluated(base: Path, version: ServedVersion | None, most_tokens: int, system: str = SYSTEM) -> str:
    """The answer as the evaluation writes it: its own functions, in this process."""
    from peft import PeftModel

    from tasks.models.workers.chat_template import load_chat
    from tasks.models.workers.generation import write_batch
    from tasks.models.workers.loading import load_base
    from tests.support.devices import CPU

    method = json.loads(Path(version.meta_file).read_text())["method"] if version else "lora"
    chat, model = load_chat(base), load_base(base, method, CPU)
    if version:
        model = PeftModel.from_pretrained(model, version.adapter_folder).eval()
    prompt = chat.prompt([{"role": "system", "content": system}, QUESTION])
    return write_batch(model, chat, [chat.encode(prompt)], most_tokens)[0].text


class Served:
    """The server, OpenAI's client for it, and what it logged."""

    def __init__(self, place: Path, base: Path, first: ServedVersion) -> None:
        from openai import OpenAI

        self.logged: list[str] = []
        self.shadow_file = place / "store" / "shadow" / "demo.jsonl"
        job = ServeJob(
            assignment=Assignment(served=first, shadow=None), host="127.0.0.1", port=0, on_loopback=True, limits=LIMITS,
            shadow_file=str(self.shadow_file),
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TUNEGATE_BASE_DIR", str(base))
            self.endpoint = Endpoint(StoreSpec(root=str(place)), job, self.logged.append, KEY)
        self.endpoint.start()
        self.root = f"http://127.0.0.1:{self.endpoint.port}"
        self.client = OpenAI(base_url=f"{self.root}/v1", api_key=KEY, max_retries=0, timeout=60)

    def ask(self, model: str = "demo@champion", most: int = 24, messages: Any = (QUESTION,), **more: Any) -> Any:
        return self.client.chat.completions.create(model=model, messages=[*messages], max_tokens=most, **more)

    def text(self, **asked: Any) -> str:
        return self.ask(**asked).choices[0].message.content

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.send(urllib.request.Request(f"{self.root}{path}", headers=headers))

    def post(self, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": kind}
        return self.send(urllib.request.Request(f"{self.root}/v1/chat/completions", body, headers))

    def send(self, request: urllib.request.Request) -> tuple[int, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def serve(self, served: ServedVersion, shadow: ServedVersion | None = None) -> str:
        """Change the versions it serves, and wait until it logs something about that."""
        lines = len(self.logged)
        self.endpoint.serve(Assignment(served=served, shadow=shadow))
        wait_for(lambda: len(self.logged) > lines)
        return self.logged[-1]


def wait_for(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def served(base, versions, tmp_path_factory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("serving"), base, versions[1])
    yield found
    found.endpoint.stop()


# --- one version answers ------------------------------------------------------------------------------------


def test_the_answer_is_the_evaluations_and_says_which_version_wrote_it(served, base, versions):
    answer = served.ask()
    assert answer.choices[0].message.content.strip() == evaluated(base, versions[1], 24)
    assert answer.choices[0].message.content.isascii()
    assert answer.model == "demo/1"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_the_models_are_the_alias_the_version_and_the_base(served, base):
    assert [model.id for model in served.client.models.list()] == ["demo@champion", "demo/1", "base"]
    assert served.text(model="demo/1") == served.text()
    assert served.text(model="base").strip() == evaluated(base, None, 24)
    assert served.text() != served.text(model="base"), "the adapter is on again"


def test_a_stream_is_the_whole_answer_in_pieces(served):
    chunks = list(served.ask(stream=True, stream_options={"include_usage": True}))
    whole = served.ask()
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert {chunk.model for chunk in chunks} == {"demo/1"}
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_the_versions_own_system_prompt_is_used_if_the_client_sends_none(served, base, versions):
    system = {"role": "system", "content": SYSTEM}
    assert served.text(messages=[system, QUESTION]) == served.text()
    other = served.text(messages=[{"role": "developer", "content": "Be rude."}, QUESTION])
    assert other.strip() == evaluated(base, versions[1], 24, "Be rude.") != served.text()


def test_max_tokens_and_stop_end_an_answer_and_say_so(served):
    whole = served.ask(most=24)
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 24)
    text = whole.choices[0].message.content
    stop = text[10:13]
    assert text.index(stop) == 10
    cut = served.ask(stop=["never said", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(c.choices[0].delta.content or "" for c in served.ask(stop=stop, stream=True))
    assert streamed == cut.choices[0].message.content


def test_stop_tokens_are_the_versions_own(served, versions, tmp_path):
    text = served.text()
    assert text.index(text[10]) == 10
    meta = json.loads(Path(versions[1].meta_file).read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"stops": [text[10]]}))
    served.serve(versions[1].model_copy(update={"version": "4", "meta_file": str(tmp_path / "meta.json")}))
    answer = served.ask()
    assert answer.choices[0].message.content == text[: text.index(text[10]) + 1], (
        "a stop token that is a letter is read"
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 11
    served.serve(versions[1])


def test_a_temperature_draws_and_a_seed_draws_the_same(served):
    one, two, other = (served.text(temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert len({one, other, served.text(temperature=0), served.text()}) == 3


def test_many_at_once_are_answered_one_after_the_other_and_too_many_are_refused(served):
    from openai import RateLimitError

    streams = [served.ask(stream=True, most=150) for _ in range(LIMITS.requests)]
    with pytest.raises(RateLimitError, match="3 requests are being answered"):
        served.ask()
    texts = ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams]
    assert len(set(texts)) == 1
    assert served.ask().model == "demo/1"


def test_a_client_that_goes_makes_room_for_others(served):
    started = time.monotonic()
    served.ask(most=300)
    whole_seconds = time.monotonic() - started
    patient = served.client.with_options(max_retries=5)
    started = time.monotonic()
    for _ in range(8):
        stream = patient.chat.completions.create(model="demo/1", messages=[QUESTION], max_tokens=300, stream=True)
        next(iter(stream))
        stream.close()
    assert patient.chat.completions.create(model="demo/1", messages=[QUESTION], max_tokens=1).model == "demo/1"
    assert time.monotonic() - started < 4 * whole_seconds, "no client waits for answers that none reads"


def test_in_a_chat_each_model_remembers_its_own_answers(served):
    chat = ChatSession(served.client, ["demo/1", "base"], 24)
    chat.reset()
    shown: list[dict[str, str]] = []
    first, second = (chat.ask(QUESTION["content"], lambda answers: shown.append(dict(answers))) for _ in range(2))
    assert len(shown) > 20, "it is shown as it grows"
    for model in ("demo/1", "base"):
        said = {"role": "assistant", "content": first.answers[model]}
        assert second.answers[model] == served.text(model=model, messages=[QUESTION, said, QUESTION])
    chat.reset()
    assert chat.ask(QUESTION["content"], lambda answers: None) == first
    too_long = chat.ask("x" * 500, lambda answers: None)
    assert "the prompt has" in too_long.error
    assert chat.ask(QUESTION["content"], lambda answers: None).error is None, "the conversation continues"


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "demo/7"}, 404, "served: demo@champion, demo/1, base"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "the prompt has 5"),
        ({"max_tokens": 501}, 400, "at most 500 are written"),
        ({"n": 2}, 400, "n: Input should be 1"),
        ({"tools": [{"type": "function"}], "logprobs": True}, 400, "not supported here: logprobs, tools"),
        ({"temperature": 3}, 400, "temperature"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ],
)
def test_what_cannot_be_done_is_reported_in_openais_form(served, change, status, message):
    asked = {"model": "demo@champion", "messages": [QUESTION]} | change
    found, body = served.post(json.dumps(asked).encode())
    error = json.loads(body)["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"})
    assert message in error["message"]


def test_what_is_no_request_is_reported_too(served):
    nothing = {"tools": None, "logprobs": False, "n": 1}
    asked = json.dumps({"model": "demo/1", "messages": [QUESTION], "max_tokens": 1} | nothing).encode()
    assert served.post(asked)[0] == 200, "a field that asks for nothing is taken"
    assert served.post(b"{")[0] == 400
    assert served.post(asked, "text/plain")[0] == 415, "a page of another site can send no JSON"
    assert served.post(b" " * (2**20 + 1))[0] == 413
    code, body = served.get("/v1/nothing", Authorization=f"Bearer {KEY}")
    assert (code, "error" in json.loads(body)) == (404, True)


def test_only_health_is_open_without_a_key(served):
    from openai import AuthenticationError

    with pytest.raises(AuthenticationError, match="TUNEGATE_API_KEY"):
        served.client.with_options(api_key="another").models.list()
    assert served.get("/version")[0] == 401
    assert served.get("/health") == (200, {"status": "ok", "model": "demo/1", "failure": None})
    assert served.get("/health", Host="evil.example")[0] == 400, "no name from elsewhere leads here"


# --- another version answers --------------------------------------------------------------------------------


def test_the_next_answer_is_the_new_versions_and_one_in_flight_ends_as_it_began(served, versions, base):
    first = served.text(most=150)
    before = served.get("/version", Authorization=f"Bearer {KEY}")[1]["served"]
    stream = served.ask(stream=True, most=150)
    pieces = [next(iter(stream))]
    assert served.serve(versions[2]) == "now demo/2 answers"
    pieces += list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == first
    assert {piece.model for piece in pieces} == {"demo/1"}
    answer = served.ask()
    assert answer.model == "demo/2"
    assert answer.choices[0].message.content.strip() == evaluated(base, versions[2], 24)
    after = served.get("/version", Authorization=f"Bearer {KEY}")[1]["served"]
    assert (before["version"], after["version"]) == ("1", "2")
    assert after["since_unix_seconds"] > before["since_unix_seconds"]
    assert after["adapter_sha256"] == versions[2].adapter_sha256
    assert [model.id for model in served.client.models.list()] == ["demo@champion", "demo/2", "base"]
    served.serve(versions[1])
    assert served.text(most=150) == first


def test_a_version_in_another_form_gets_a_base_of_its_own(served, versions, base):
    first = served.text()
    assert served.serve(versions[3]) == "now demo/3 answers"
    about = served.get("/version", Authorization=f"Bearer {KEY}")[1]["served"]
    assert about["quantisation"] == {"quant_type": "nf4", "double_quant": True}
    answer = served.ask()
    assert (answer.model, answer.choices[0].message.content.strip()) == ("demo/3", evaluated(base, versions[3], 24))
    served.serve(versions[1])
    assert served.text() == first


def test_a_version_that_is_not_what_was_registered_is_not_served(served, versions):
    line = served.serve(versions[2].model_copy(update={"adapter_sha256": "0" * 64}))
    assert "demo/2 cannot be served" in line
    assert "demo/1 keeps answering" in line
    assert served.ask().model == "demo/1"
    status, health = served.get("/health")
    assert (status, health["status"], health["model"]) == (200, "degraded", "demo/1")
    served.serve(versions[1])
    assert served.get("/health")[1]["status"] == "ok"


def test_the_challenger_is_asked_the_same_in_the_shadow_and_both_are_kept(served, versions, base):
    challenger = versions[2].model_copy(update={"alias": "challenger"})
    assert served.serve(versions[1], challenger) == "now demo/1 answers; in the shadow: demo/2"
    asked = [{"role": "user", "content": "My address is ada@math.org, and yours?"}]
    champions = [served.text(), served.text(messages=asked)]
    served.text(model="base")  # nobody's answer
    wait_for(lambda: served.shadow_file.exists() and len(served.shadow_file.read_text().splitlines()) == 2)
    assert stat.S_IMODE(served.shadow_file.stat().st_mode) == 0o600
    pairs = [Pair.model_validate_json(line) for line in served.shadow_file.read_text().splitlines()]
    assert [pair.champion.answer for pair in pairs] == champions
    assert pairs[0].challenger.answer.strip() == evaluated(base, versions[2], 24)
    assert pairs[1].messages[0]["content"] == "My address is [EMAIL], and yours?"
    assert {(pair.champion.version, pair.challenger.version) for pair in pairs} == {("demo/1", "demo/2")}


def test_a_challenger_that_becomes_champion_is_there_already(served, versions, base):
    served.serve(versions[1], versions[2].model_copy(update={"alias": "challenger"}))
    served.serve(versions[2])
    assert [model.id for model in served.client.models.list()] == ["demo@champion", "demo/2", "base"]
    assert served.text().strip() == evaluated(base, versions[2], 24)
    served.serve(versions[1])


def test_a_server_whose_starter_is_gone_answers_what_was_asked_and_ends(served):
    stream = served.ask(stream=True, most=200)
    next(iter(stream))
    served.endpoint.child.stdin.close()  # as when the command was killed
    list(stream)
    served.endpoint.child.wait(30)
    assert served.endpoint.child.returncode == 0
    report = json.loads((served.endpoint.out / "report.json").read_text())
    assert report["answered"]["demo/1"] > 0


# --- the commands, over a real registry ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def tunegate(place):
    """Run a command in an empty folder; answer with (exit code, JSON, stderr)."""
    with prefect_server(place) as environment:

        def run(*arguments: str, given: str = "") -> tuple[int, dict, str]:
            done = subprocess.run(
                command(place, *arguments),
                env=environment,
                cwd=place,
                capture_output=True,
                text=True,
                input=given,
                check=False,
            )
            return done.returncode, json.loads(done.stdout), done.stderr

        run.environment = environment
        yield run


def command(place: Path, *arguments: str) -> list[str]:
    return [*COMMAND, *arguments, "--json", "--set", f"store.root={place / 'store'}"]


@pytest.fixture(scope="module")
def registered(tunegate) -> str:
    """Two versions of the smoke preset, the first of them the champion."""
    for changes in ([], ["--set", "train.learning_rate=0.004"]):
        code, _, errors = tunegate("run", "smoke", *changes)
        assert code in (0, 1, 3), errors
    code, _, errors = tunegate("promote", "tunegate-smoke", "--version", "1", "--override", "--reason", "a test begins")
    assert code == 0, errors
    return "tunegate-smoke"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_follows_the_champion_and_ends_in_order(registered, tunegate, place):
    from openai import OpenAI

    asked = command(place, "serve", registered, "--port", "0", "--shadow", f"{registered}@challenger")
    piped = {"stdout": subprocess.PIPE, "text": True, "env": tunegate.environment, "cwd": place}
    with (place / "serve.log").open("w") as log, subprocess.Popen(asked, stderr=log, **piped) as serving:
        try:
            payload = json.loads(serving.stdout.readline())
            first, second = payload["version"], payload["shadow"]
            assert first == f"{registered}/1" != second
            client = OpenAI(base_url=payload["url"], api_key="none", max_retries=0)
            asked = {"model": payload["model"], "messages": [QUESTION], "max_tokens": 12}
            assert client.chat.completions.create(**asked).model == first
            wait_for(Path(payload["shadow_file"]).exists)
            code, report, errors = tunegate("shadow", registered)
            assert (code, report["prompts"], report["challenger"]["version"]) == (0, 1, second), errors
            promoted = ["--version", second.rpartition("/")[2], "--override", "--reason", "a test continues"]
            code, _, errors = tunegate("promote", registered, *promoted)
            assert code == 0, errors
            wait_for(lambda: client.chat.completions.create(**asked).model == second)
        finally:
            serving.send_signal(signal.SIGTERM)
            code = serving.wait(60)
    said = (place / "serve.log").read_text()
    assert code == 0, said
    assert "for you alone, personal data masked" in said
    assert f"now {second} answers" in said
    assert f"1 by {first}" in said
    assert not list((place / "store" / "store" / "serving").iterdir()), "what a server leaves is only kept if it failed"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chat_asks_version_and_base(registered, tunegate):
    lines = "What is 1?\nWhat is 1?\n/reset\nWhat is 1?\n/quit\nnever asked\n"
    code, found, errors = tunegate("chat", f"{registered}/1", "--base", "--max-new-tokens", "8", given=lines)
    assert code == 0, errors
    first, _, third = (turn["answers"] for turn in found["turns"])
    assert set(first) == {"tunegate-smoke/1", "base"}
    assert first["base"] != first["tunegate-smoke/1"]
    assert first == third


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_door_that_others_can_reach_needs_a_key(registered, tunegate):
    code, error, _ = tunegate("serve", registered, "--host", "0.0.0.0")
    assert (code, "TUNEGATE_API_KEY" in error["error"]["problems"][0]["act"]) == (2, True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mlflows_own_server_answers_with_the_registered_version(registered, tunegate, place):
    """As a user runs it who has MLflow and the store."""
    port, store = free_port(), place / "store"
    environment = tunegate.environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{store / 'mlflow.db'}"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TUNEGATE_STORE_DIR": str(store)}
    mlflow = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{registered}@champion"]
    mlflow += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    server = Server(mlflow, environment, place / "models.log", f"http://127.0.0.1:{port}/health")
    server.start()
    try:
        body = json.dumps({"inputs": ["What is 1?"], "params": {"max_new_tokens": 8}}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as response:
            (answer,) = json.load(response)["predictions"]
    finally:
        server.kill(signal.SIGTERM)
    uri = f"models:/{registered}@champion"
    code, ours, errors = tunegate("predict", "What is 1?", "--model", uri, "--max-new-tokens", "8")
    assert code == 0, errors
    assert answer == ours["answer"]


# --- small parts --------------------------------------------------------------------------------------------


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_text_in_pieces_is_cut_where_the_whole_text_is(text, stops, data):
    trimmer, out, left = StopStringTrimmer(stops), "", text
    while left and not trimmer.found:
        size = data.draw(st.integers(1, len(left)))
        out, left = out + trimmer.feed(left[:size]), left[size:]
    out += trimmer.rest()
    ends = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    assert out == text[: min(ends)[1]] if ends else out == text


def test_a_model_is_named_by_alias_or_version():
    assert (
        parse_model_name("demo", "serve")
        == parse_model_name("models:/demo@champion", "serve")
        == ModelName("demo", "champion", None)
    )
    assert parse_model_name("demo/3", "serve").uri == "models:/demo/3"
    for wrong in ("", "@champion", "demo@", "demo/"):
        with pytest.raises(ConfigError, match="NAME, NAME@champion or NAME/3"):
            parse_model_name(wrong, "serve")


def pair(champion: str, challenger: str, versions: tuple[str, str] = ("demo/1", "demo/2"), at: float = 1.0) -> Pair:
    mine, theirs = (
        ShadowAnswer(version=version, answer=answer, tokens=4, seconds=0.2, stopped=bool(answer))
        for version, answer in zip(versions, (champion, challenger), strict=True)
    )
    return Pair(unix_seconds=at, messages=[QUESTION], champion=mine, challenger=theirs)


def test_the_newest_pair_of_versions_is_compared():
    old = pair("a b", "c d", ("demo/0", "demo/1"))
    found = compare_pairs([old, pair("a b", "a  b"), *[pair("a b c d", "a b x y", at=3)] * 2, pair("", "", at=9)])
    assert (found.prompts, found.other_pairs) == (4, 1)
    assert (found.since_unix_seconds, found.until_unix_seconds) == (1, 9)
    assert found.same.low < found.same.value == 0.5 < found.same.high
    assert found.rouge_l == pytest.approx((1 + 0.5 + 0.5 + 1) / 4)
    assert [one.challenger for one in found.most_different] == ["a b x y"], "each difference once"
    assert (found.champion.tokens, found.champion.ms_per_token) == (4, 50)
    assert found.challenger.stopped.value == 0.75
