"""The plain CPU, for models that are loaded in the test's own process."""

from data_contracts.data_reports import FileRef
from data_contracts.reports import BaseModelRef
from data_contracts.run_spec import EvaluateSpec
from data_contracts.stage_inputs import EvaluationInputs
from tasks.runtime.workers.device import Device

CPU = Device("cpu", "fp32", "test", 1, "test")


def evaluation_of(base: BaseModelRef, test: FileRef, spec: EvaluateSpec) -> EvaluationInputs:
    """An evaluation in fp32 on one thread."""
    return EvaluationInputs(
        base=base, test=test, spec=spec, task_files=None, max_tokens=256, precision="fp32", threads=1
    )
