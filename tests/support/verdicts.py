"""Trained arms with made-up costs, and the settings that gates judge them by."""

from data_contracts.reports import AdapterRef, LossPoint, Quantisation, TrainReport
from data_contracts.run_spec import GateSpec

SETTINGS = GateSpec(bootstrap_draws=1000, max_accuracy_drop=None, min_stop_rate=None)


def trained(name, arm=None, seed=17, seconds=1.0, peak=2_000_000_000):
    quantised = None if (arm or name) == "lora" else Quantisation(quant_type="nf4", double_quant=True)
    loss = [LossPoint(step=i, loss_nats=3.0, learning_rate=1e-4, seconds=seconds + i % 3 / 100) for i in range(20)]
    return TrainReport(
        name=name, arm=arm or name, method="lora" if (arm or name) == "lora" else "qlora", seed=seed,
        adapter=AdapterRef(folder=name, sha256=name), step0_sha256="s", quantisation=quantised, steps=20,
        resumed_from_step=0, train_rows=9, rows_too_long=0, too_long="left out", train_tokens=9, completion_tokens=9,
        trainable_parameters=9, weights_bytes=10**9 if (arm or name) == "lora" else 10**8, peak_rss_bytes=peak,
        peak_train_bytes=peak, predicted_train_bytes=None, seconds=9, train_seconds=9, useful_tokens_per_s=9,
        final_validation_nll_nats=None, validation=[], best_step=None, stopped_early=False, micro_batches=1, loss=loss,
        precision="fp32", precision_reason="", threads=2, threads_reason="", scoring="packed", scoring_reason="",
        device="cpu",
    )  # fmt: skip
