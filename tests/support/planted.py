"""A made-up run report and the numbers in it: every test states those it is about."""

import os
from pathlib import Path

from data_contracts.data_reports import DatasetManifest, Drift, FileRef, Repaired
from data_contracts.reports import (
    AdapterRef,
    BaseModelRef,
    EvalReport,
    LoadedBack,
    LossPoint,
    MeasuredMemory,
    ModelVersion,
    Quantisation,
    RecordedRun,
    RunReport,
    SampleAnswer,
    Stage,
    TaskScore,
    TrainReport,
)
from data_contracts.run_spec import RunSpec, StoreSpec
from data_contracts.verdict import (
    Claim,
    Comparison,
    Estimate,
    Flips,
    GateReport,
    GateResult,
    SliceGain,
    TaskChange,
)
from tasks.reporting.finished_runs import report_file
from tasks.runtime.store import Store


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, error=half / 1.645)


def comparison(released: str, items: int, clusters: int, **measured) -> Comparison:
    """What was not measured is None or empty, as in a real one."""
    empty: dict = {field: {} for field in ("bits_per_byte", "seed_sd", "gains", "accuracy", "accuracy_gains", "forms")}
    empty |= {"detectable": {}, "slices": [], "general": [], "claims": []}
    unknown = ("gain", "champion_gain", "retention", "accuracy_drop", "flips", "stop_rate")
    empty |= dict.fromkeys((*unknown, "memory_saving", "weights_saving", "speed_ratio"))
    named = {"candidate": released, "released": released, "items": items, "clusters": clusters, "seeds": 1}
    return Comparison(**empty | named | measured)


def ref(path: str) -> FileRef:
    return FileRef(path=path, sha256="0" * 64)


def dataset() -> DatasetManifest:
    files = {name: ref(f"data/{name}.parquet") for name in ("train", "validation", "test")}
    return DatasetManifest(
        snapshot_id="5" * 64,
        rows_in=100,
        kept=90,
        quarantined=4,
        duplicates=6,
        exact_duplicates=4,
        near_duplicates=2,
        reasons={"empty_answer": 3, "unparsable": 1},
        flags={"refusal": 2},
        repairs={"spaces": Repaired(rows=5, examples=["a[0].jsonl:4 'a  b' -> 'a b'"])},
        languages={"en": 80, "?": 10},
        drift=Drift(reference="6" * 64, values={"ks_prompt_chars": 0.125}),
        contamination={"test": 1},
        splits={"train": 70, "validation": 5, "test": 15},
        known_rows=0,
        **files,
        quarantine=ref("data/quarantine.jsonl"),
        duplicate_rows=ref("data/duplicates.parquet"),
        contract_result=ref("data/contract.json"),
        data_docs="data/docs/index.html",
    )


def arm(method: str, weights: int) -> TrainReport:
    return TrainReport(
        name=method,
        arm=method,
        method=method,
        seed=17,
        adapter=AdapterRef(folder=f"adapters/{method}", sha256=method * 8),
        step0_sha256="same",
        quantisation=None if method == "lora" else Quantisation(quant_type="nf4", double_quant=True),
        steps=10,
        resumed_from_step=0,
        train_rows=70,
        rows_too_long=1,
        too_long="left out",
        train_tokens=5000,
        completion_tokens=2000,
        trainable_parameters=4_884_480,
        weights_bytes=weights,
        peak_rss_bytes=1_500_000_000,
        peak_train_bytes=1_400_000_000,
        predicted_train_bytes=1_500_000_000 if method == "lora" else None,
        measured_memory=MeasuredMemory(
            process=500_000_000, weights=weights, adapters=20_000_000, optimiser=40_000_000, rest=840_000_000 - weights
        ),
        gradients_bytes=20_000_000,
        seconds=130.0,
        train_seconds=120.0,
        useful_tokens_per_s=16.7,
        final_validation_nll_nats=2.5,
        validation=[],
        best_step=None,
        stopped_early=False,
        micro_batches=1,
        loss=[LossPoint(step=1, loss_nats=4.0, learning_rate=1e-4, seconds=12.0)],
        precision="fp32",
        precision_reason="no bf16",
        threads=2,
        threads_reason="2 of 2 cores are free",
        batch="4.0 rows and 900 tokens a step",
        batch_reason="train.batch_tokens=1024 holds no more",
        device_reason="torch is built without CUDA",
        scoring="packed",
        scoring_reason="losses equal the padded forward's",
        device="cpu",
    )


def scores(target: str, nll: float) -> EvalReport:
    return EvalReport(
        target=target,
        adapter_sha256=None if target == "base" else target * 8,
        items_sha256="i",
        nll_nats=nll,
        bits_per_byte=nll / 4,
        accuracy=0.55,
        accuracy_interval=(0.5, 0.6),
        lexical_baseline_accuracy=0.57,
        items=15,
        scores=[TaskScore(task="domain_generate", metric="stopped", value=0.75, items=8)],
        samples=ref(f"samples/{target}.jsonl"),
        facts=ref(f"samples/{target}.facts.jsonl"),
        answers=[SampleAnswer(question="What is `[b]x[/b]`?", reference="A ref.", answer=f"{target} says so.")],
        ms_per_token=41.0,
        seconds=3.0,
    )


def planted(root: Path, run_id: str = "20261124-abc", aliases: list[str] | None = None) -> RunReport:
    gates = [
        GateResult(
            name="retention", direction="at least", threshold=0.8, actual=0.9, interval=(0.85, 0.95), verdict="pass", why="kept"
        )
    ]  # fmt: skip
    measured = comparison(
        "qlora", 15, 14,
        nll_nats={"base": 4.0, "lora": 2.0, "qlora": 2.2}, bits_per_byte={"base": 1.0, "lora": 0.5, "qlora": 0.55},
        gains={"lora": estimate(2.0, 0.1), "qlora": estimate(1.8, 0.1)}, gain=estimate(1.8, 0.1),
        accuracy={"base": 0.5, "lora": 0.6, "qlora": 0.6}, retention=estimate(0.9), accuracy_drop=estimate(0.0, 0.02),
        flips=Flips(lost=1, won=2, rate=0.2, p=1.0), stop_rate=estimate(0.75, 0.1),
        slices=[SliceGain(kind="source", name="a[0].jsonl", items=8, gain=estimate(1.5, 0.3))],
        general=[
            TaskChange(
                task="general_piqa", metric="accuracy", items=200, base=0.6, candidate=0.58, change=estimate(-0.02, 0.03), p=0.4
            )
        ],
        forms={"full": estimate(0.01, 0.005)}, memory_saving=estimate(0.2, 0.0), weights_saving=0.75,
        speed_ratio=estimate(float("nan"), 0.0), detectable={"retention": 0.08},
        claims=[Claim(claim="keeps 99 % of the quality", source="s", measured=None, verdict="does not hold", note="+90.0%")],
    )  # fmt: skip
    return RunReport(
        run_id=run_id,
        spec=RunSpec(store=StoreSpec(root=str(root))).model_dump(mode="json"),
        dataset=dataset(),
        base=BaseModelRef(
            name="builtin:x",
            digest="d",
            path="bases/d",
            note="dequantised Q4_1",
            revision=None,
            stops=[],
            chat_template=None,
        ),
        arms=[arm("lora", 500_000_000), arm("qlora", 125_000_000)],
        evaluations=[scores("base", 4.0), scores("lora", 2.0), scores("qlora", 2.2)],
        comparison=measured,
        gate=GateReport(gates=gates, off=["max_ms_per_token is null"], verdict="pass"),
        recorded=RecordedRun(mlflow_run_id=f"mlflow-{run_id}", arm_run_ids={"lora": "child-l", "qlora": "child-q"}),
        model=ModelVersion(name="m", version="1", aliases=["champion"] if aliases is None else aliases, run_id="r"),
        loaded_back=LoadedBack(question="q", answer="a", as_evaluated=True),
        stages=[Stage(name="ingest", status="cached", seconds=0.1), Stage(name="train", status="ran", seconds=120)],
        html=f"runs/{run_id}/report.html",
    )


def saved(report: RunReport, root: Path, age_seconds: int = 0) -> None:
    path = report_file(Store(root), report.run_id)
    path.parent.mkdir(parents=True)
    path.write_text(report.model_dump_json())
    then = path.stat().st_mtime - age_seconds
    os.utime(path, (then, then))
