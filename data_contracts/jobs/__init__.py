"""What a step asks of a worker, a frozen model for each worker: written to `spec.json`, read once by the harness."""

from pydantic import BaseModel, ConfigDict


class Job(BaseModel):
    """The settings and inputs of one child process. Its files are absolute paths: a worker knows no store."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", protected_namespaces=())

    @property
    def processes(self) -> int:
        """How many share the work; several are started by torchrun's agent."""
        return 1

    @property
    def on_ray(self) -> bool:
        """Whether Ray finds the places of those processes."""
        return False
