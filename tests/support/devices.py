"""The plain CPU, for models that are loaded in the test's own process."""

from tasks.runtime.workers.device import Device

CPU = Device("cpu", "fp32", "test", 1, "test")
