"""A registry with real versions of real, tiny adapters and what gates said of them; and processes that die in a move."""

import itertools
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_contracts.data_reports import FileRef
from data_contracts.errors import GateError
from data_contracts.reports import AdapterRef, EvalReport, ModelVersion, SampleAnswer
from data_contracts.run_spec import StoreSpec
from data_contracts.verdict import GateReport
from tasks.release.promotion import carry_out, plan_rollback
from tasks.release.promotion_ledger import Ledger
from tasks.release.registry import CHALLENGER
from tasks.runtime.mlflow_client import connect
from tasks.runtime.store import Store, digest

NAME = "moves"
SERVED = Path(__file__).parents[2] / "tasks" / "release" / "workers" / "served_model.py"
SPEC = {"evaluate": {"sample_tokens": 8}, "gates": {"max_ms_per_token": None, "max_memory_gb": None}}


def log_judgement(
    verdict: str, adapter: str, champion: str | None = None, answers: list[SampleAnswer] | None = None
) -> None:
    """What a run keeps of its gates, in the MLflow run that is open."""
    import mlflow

    mlflow.log_dict(GateReport(gates=[], off=[], verdict=verdict).model_dump(mode="json"), "gate.json")
    mlflow.log_dict({"released": "qlora"}, "comparison.json")
    mlflow.log_dict(SPEC, "spec.yaml")
    scored = {"qlora": adapter} | ({"champion": champion} if champion else {})
    for name, sha256 in scored.items():
        report = evaluation(name, sha256, answers or [])
        mlflow.log_dict(report.model_dump(mode="json"), f"evaluations/{name}.json")


def evaluation(target: str, adapter: str, answers: list[SampleAnswer]) -> EvalReport:
    none = FileRef(path="none", sha256="0" * 64)
    return EvalReport(
        target=target, adapter_sha256=adapter, items_sha256="i", nll_nats=2.0, bits_per_byte=None, accuracy=None,
        accuracy_interval=None, lexical_baseline_accuracy=None, items=1, scores=[], samples=none, facts=none, answers=answers,
        ms_per_token=None, seconds=1.0, precision="fp32",
    )  # fmt: skip


class Registry:
    """A store with a tiny base and adapters that differ by their seed."""

    def __init__(self, root: Path, base: Path) -> None:
        self.store, self.place = StoreSpec(root=str(root)), Store(root)
        self.base = base
        (self.place.files / "bases").mkdir(parents=True)
        (self.place.files / "bases" / "tiny").symlink_to(base)

    def adapter(self, seed: int) -> AdapterRef:
        """Random, and no mere nothing: its B is not zero."""
        import torch
        from safetensors.torch import load_file, save_file

        from tasks.models.workers.init_adapter import make_step0
        from tests.conftest import step0_job

        folder = self.place.files / "adapters" / str(seed)
        if not folder.exists():
            folder.mkdir(parents=True)
            make_step0(step0_job(self.base, rank=2, alpha=4, seed=seed), folder)
            (file,) = folder.rglob("adapter_model.safetensors")
            draw = torch.Generator().manual_seed(seed)
            weights = {name: torch.randn(w.shape, generator=draw) * 0.1 for name, w in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        (file,) = folder.rglob("adapter_model.safetensors")
        return AdapterRef(folder=str(file.parent.relative_to(self.place.files)), sha256=digest(file))

    def version(
        self, seed: int, verdict: str = "pass", compared_with: int | None = None, answers: list[SampleAnswer] | None = None,
        judgement_of: AdapterRef | None = None,
    ) -> str:  # fmt: skip
        """A new version, as if a run had made it. compared_with: seed of the champion; judgement_of: another adapter
        that the kept report is about."""
        import mlflow
        from mlflow.models import infer_signature

        from tasks.runtime.mlflow_client import open_experiment

        client, adapter = connect(self.store), self.adapter(seed)
        open_experiment(client, self.store, NAME)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True), mlflow.start_run() as run:
            log_judgement(
                verdict,
                (judgement_of or adapter).sha256,
                self.adapter(compared_with).sha256 if compared_with else None,
                answers,
            )
            meta = Path(folder) / "meta.json"
            meta.write_text(json.dumps(self._meta(adapter)))
            artifacts = {"adapter": str(self.place.path(adapter.folder)), "meta": str(meta)}
            info = mlflow.pyfunc.log_model(
                name="model", python_model=str(SERVED), artifacts=artifacts, pip_requirements=["mlflow"],
                signature=infer_signature(["?"], ["."], params={"max_new_tokens": 64}),
            )  # fmt: skip
        if not client.search_registered_models(f"name = '{NAME}'"):
            client.create_registered_model(NAME)
        tags = {
            "tunegate.method": "lora", "tunegate.adapter_sha256": adapter.sha256, "tunegate.verdict": verdict,
            "tunegate.base_digest": digest(self.base), "tunegate.run": run.info.run_id,
        }  # fmt: skip
        made = client.create_model_version(NAME, f"models:/{info.model_id}", tags=tags, model_id=info.model_id)
        client.set_registered_model_alias(NAME, CHALLENGER, made.version)
        return str(made.version)

    def _meta(self, adapter: AdapterRef) -> dict[str, Any]:
        folder = self.place.path(adapter.folder)
        return {
            "base": "tiny", "base_digest": digest(self.base), "base_path": "bases/tiny", "base_revision": None,
            "method": "lora", "quantisation": None, "precision": "fp32", "system_prompt": None,
            **words_of(self.base), "code_sha256": digest(SERVED),
            "adapter_files": {file.name: digest(file) for file in sorted(folder.iterdir())},
        }  # fmt: skip


def words_of(base: Path) -> dict[str, Any]:
    from tasks.models.workers.chat_template import load_chat

    chat = load_chat(base)
    return {"stops": list(chat.stops), "chat_template": chat.tokenizer.chat_template}


# --- other processes ----------------------------------------------------------------------------------------


def try_to_promote(root: str, version: str, start: Any, ends: Any) -> None:
    """Plan, wait for the others, then move: how it ended."""
    from tasks.release import promotion

    store = StoreSpec(root=root)
    plan = promotion.plan_promotion(store, NAME, version)
    start.wait()
    try:
        promotion.carry_out(store, plan, None)
        ends.put((version, "won"))
    except GateError as error:
        ends.put((version, error.problems[0].what))


def promote_and_die(root: str, version: str, write: int, torn: bool) -> None:
    """Promote, and be killed just before a write: 0 the intention, 1 the alias, 2 the registry's tag, 3 the end. torn: in
    the middle of it, which only a line of the ledger can be."""
    from mlflow import MlflowClient

    from tasks.release.promotion import promote_version

    number = itertools.count()

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            if next(number) == write:
                if torn:
                    with self.file.open("a") as file:
                        file.write('{"after":"')
                os.kill(os.getpid(), signal.SIGKILL)
            return function(self, *args)

        return call

    Ledger.write = dying(Ledger.write)
    for name in ("set_registered_model_alias", "set_registered_model_tag"):
        setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
    promote_version(StoreSpec(root=root), NAME, version)


def rollback_version(store: StoreSpec, name: str) -> ModelVersion:
    """Point `champion` back at the version before. Raises ConfigError if there was none."""
    return carry_out(store, plan_rollback(store, name), check=None).model
