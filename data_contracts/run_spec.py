"""RunSpec: every setting of a run, once, with its meaning, unit and range. Defaults live only here and in data_spec.py."""

from collections.abc import Iterator
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import Field, model_validator

from data_contracts.data_spec import ContractSpec, CurateSpec, DataSpec, Fraction, RulesSpec, Section, holds_secret
from data_contracts.train_spec import TrainSpec


class ScheduleSpec(Section):
    cron: str | None = None
    """When to retrain, no matter what `watch` finds: five cron fields, such as "0 3 * * *"; null: only for a reason."""
    timezone: str = "UTC"
    """Time zone of `cron` (IANA name), such as Europe/Berlin."""
    watch_minutes: Annotated[int, Field(ge=1)] | None = 5
    """Minutes between two checks for fresh data while `tunegate up` runs; null never checks."""
    quiet_seconds: Annotated[float, Field(ge=0.0)] = 30.0
    """How long a source file must not have changed before it is read: one that is still being written waits."""
    min_new_rows: Annotated[int, Field(ge=1)] = 1
    """Fewest rows never seen before, or changed, that start a retrain."""
    min_new_share: Fraction = 0.05
    """Smallest share of the rows known so far that the new ones must make; both limits must be reached."""
    drift_window: Annotated[int, Field(ge=1)] = 5
    """Number of checks that found new rows whose drift is remembered (M of the next setting)."""
    drift_needed: Annotated[int, Field(ge=1)] | None = 3
    """How many of the last M checks must find the new rows drifted, by the contract's limits, to start a retrain though
    they are few; null never does."""
    max_champion_days: Annotated[float, Field(gt=0.0)] | None = None
    """Days after which a champion is too old: then one new row is enough; null: it never is. Without any new row a
    retrain would make the same model again."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a retrain does while another one works in the same store: wait for its end, or end as Skipped."""
    notify: list[str] = []
    """Prefect notification blocks that get a message at start, verdict and failure, as TYPE/NAME: slack-webhook/team. Their
    secrets are stored in Prefect, never here."""

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "ScheduleSpec":
        found = []
        if self.cron is not None and len(self.cron.split()) != 5:
            found.append(f"cron: {self.cron!r} has not five fields: minute hour day month weekday")
        if self.drift_needed is not None and self.drift_needed > self.drift_window:
            found.append(f"drift_needed: {self.drift_needed} of the last {self.drift_window} checks cannot be")
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            found.append(f"timezone: no zone {self.timezone!r} is known; Europe/Berlin is one")
        found += [f"notify: {name!r} is not TYPE/NAME" for name in self.notify if len(name.split("/")) != 2]
        if found:
            raise ValueError("\n".join(found))
        return self


ServingForm = Literal["full", "merged"]


class ModelSpec(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "tunegate-model"
    """Name in the MLflow registry, and the scope of the row ledger."""
    base: str = "builtin:smollm2-135m"
    """Base model: `builtin:smollm2-135m`, `builtin:tiny-llama` (random, for tests), a folder, or a hub id."""
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+([./][A-Za-z0-9_-]+)*$")] | None = None
    """Hub revision (commit) of the base; null takes the newest and records which it was."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of weights and arithmetic; `auto` takes bf16 only where the device has it in hardware."""


DOMAIN_TASKS = ("domain_nll", "domain_choice", "domain_generate")
"""The tasks that need nothing but the test split."""


class EvaluateSpec(Section):
    tasks: Annotated[list[str], Field(min_length=1)] = list(DOMAIN_TASKS)
    """lm-eval tasks: three built from the test split; `general_nll`, `general_openbookqa`, `general_piqa` and `general_siqa`
    (text and questions of no domain, offline); and any lm-eval task whose data can be had. See docs/evaluation.md."""
    task_folder: str | None = None
    """Folder with lm-eval task files (YAML) of your own, and their data; their names go into `tasks`."""
    max_items: Annotated[int, Field(ge=2)] = 1000
    """Most test rows scored (lowest hash first: the same ones each time)."""
    task_limit: Annotated[int, Field(ge=1)] | None = None
    """Most items of each further lm-eval task; null scores all."""
    generate_items: Annotated[int, Field(ge=1)] = 64
    """Most test questions that domain_generate answers: writing costs far more than scoring."""
    generate_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer of domain_generate in tokens; only questions whose true answer is no longer are asked."""
    forms: list[ServingForm] = []
    """Further forms in which the qlora arm's adapter may be served, scored in addition to the 4-bit base it was trained on: `full`
    on the full-precision base, `merged` into its weights as 16-bit numbers."""
    batch_tokens: Annotated[int, Field(ge=16)] = 512
    """Most tokens in one forward pass."""
    sample_questions: Annotated[int, Field(ge=0)] = 3
    """Test questions answered by every model, to read next to the numbers."""
    sample_tokens: Annotated[int, Field(ge=1)] = 48
    """Longest sample answer in tokens."""


# An infinite limit would pass everything and not be reported as turned off.
Nats = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class GateSpec(Section):
    """Each gate is one setting, and null turns it off: what is not written here is not judged."""

    min_lora_gain_nats: Nats | None = 0.0
    """LoRA's loss must be more than this below the base's, in nats per token, or a comparison with it says nothing."""
    min_retention: Fraction | None = 0.95
    """QLoRA must keep at least this share of LoRA's loss gain."""
    max_accuracy_drop: Fraction | None = 0.02
    """How far QLoRA's accuracy in domain_choice may be below LoRA's, as a share of the items."""
    min_gain_nats: Nats | None = 0.0
    """The candidate's loss must be more than this below the base's, in nats per token."""
    max_champion_nll_increase_nats: Nats | None = 0.02
    """How much worse than the champion a candidate may be, in nats per token: 0.02 is 2 % of perplexity. With 0 a
    candidate that is as good as the champion is never decided."""
    max_forgetting_nats: Nats | None = None
    """How much worse than the base the candidate may be on general text (general_nll), in nats per token."""
    max_forgetting_accuracy: Fraction | None = None
    """How far the candidate's accuracy may be below the base's in each task of general knowledge, as a share of the items."""
    min_slice_gain_nats: Nats | None = 0.0
    """The candidate's loss must be more than this below the base's in every slice: source, language, length."""
    min_slice_items: Annotated[int, Field(ge=2)] = 30
    """Slices with fewer items are shown, not judged."""
    min_stop_rate: Fraction | None = 0.8
    """Share of domain_generate's answers that the candidate must end with a stop token."""
    max_ms_per_token: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Longest time of one written token, in milliseconds, one answer at a time, on this machine."""
    max_memory_gb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Most memory of a process that loads the candidate and answers, in GB, on this machine."""
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    """Level of each end of an interval: 0.95 means that the true value is below the lower end in 5 % of all cases."""
    bootstrap_draws: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap resamples behind each interval."""


class StoreSpec(Section):
    root: str = "mlruns"
    """Folder of everything a run keeps: MLflow's database, artifacts, snapshots, checkpoints, Prefect's state."""
    mlflow_uri: str | None = None
    """MLflow tracking server; null uses the database in `root`. Its password comes from the environment."""

    @model_validator(mode="after")
    def _no_address_holds_a_secret(self) -> "StoreSpec":
        if self.mlflow_uri and holds_secret(self.mlflow_uri):
            act = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, PGPASSWORD for Postgres"
            raise ValueError(f"mlflow_uri holds a password; put it in the environment: {act}")
        return self


class RunSpec(Section):
    """One run. Sections mirror the stages."""

    data: DataSpec = DataSpec()
    rules: RulesSpec = RulesSpec()
    contract: ContractSpec = ContractSpec()
    curate: CurateSpec = CurateSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    gates: GateSpec = GateSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    store: StoreSpec = StoreSpec()

    @model_validator(mode="after")
    def _gates_can_be_judged(self) -> "RunSpec":
        if found := list(_unmeasured(self.evaluate, self.gates)):
            raise ValueError("\n".join(found))
        return self


def _unmeasured(evaluate: EvaluateSpec, gates: GateSpec) -> Iterator[str]:
    """Gates whose numbers no task would give: they would fail every candidate."""
    needs = {
        "min_lora_gain_nats": "domain_nll", "min_retention": "domain_nll", "max_accuracy_drop": "domain_choice",
        "min_gain_nats": "domain_nll", "max_champion_nll_increase_nats": "domain_nll",
        "max_forgetting_nats": "general_nll", "min_slice_gain_nats": "domain_nll", "min_stop_rate": "domain_generate",
    }  # fmt: skip
    for gate, task in needs.items():
        if getattr(gates, gate) is not None and task not in evaluate.tasks:
            yield f"gates.{gate} needs {task} in evaluate.tasks; set it to null to judge without it"
    if gates.max_forgetting_accuracy is not None and not set(evaluate.tasks) - {*DOMAIN_TASKS, "general_nll"}:
        yield "gates.max_forgetting_accuracy needs a task of general knowledge in evaluate.tasks, such as general_piqa"
