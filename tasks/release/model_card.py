"""The model card of a version, made from its evidence: Markdown with the head that model hubs read."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from data_contracts.lineage import Lineage
from tasks.release.lineage import Made
from tasks.reporting.markdown import environment, escape
from tasks.reporting.sentences import label_of, sentences, started
from tasks.reporting.tables import cost_rows, models_of, score_rows

CARD_FILE = "README.md"
FIGURES = "figures"
_METRICS = {"nll_nats": "held-out loss, nats per token", "bits_per_byte": "bits per byte", "accuracy": "accuracy"}


def model_card(made: Made, lineage: Lineage, plots: Sequence[str]) -> str:
    """plots: names of the pictures that lie beside it, in the folder of figures."""
    from markupsafe import Markup

    models = models_of(made.arms, made.evaluations)
    # The lineage itself names the card's sha256; packages lie beside it.
    told = lineage.model_dump_json(indent=1, exclude={"files": True, "spec": True, "machine": {"packages"}})
    body = environment(escape).get_template("card.md.j2").render(
        made=made,
        lineage=lineage,
        start=started(made.arm.start) if made.arm.start else "starts from scratch",
        names=[label_of(name) for name in models],
        tables=(score_rows(models, made.comparison), cost_rows(models)),
        sentences=list(sentences(made.comparison)),
        plots={name: Markup(f"{FIGURES}/{name}.png") for name in plots},
        lineage_json=Markup(html.escape(told, quote=False)),
    )  # fmt: skip
    return f"---\n{_head(made, lineage)}\n---\n{body}"


def _head(made: Made, lineage: Lineage) -> str:
    """As huggingface_hub reads it. A base that is no hub id has no place there."""
    from huggingface_hub import ModelCardData

    is_adapter = lineage.training.method != "full"
    data = ModelCardData(
        license=lineage.base_licence.lower() if " " not in lineage.base_licence else "other",
        base_model=lineage.base.name if lineage.base.revision else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["tunegate", lineage.training.method],
        model_name=lineage.name,
        eval_results=list(_results(made, lineage)),
    )
    return str(data.to_yaml())


def _results(made: Made, lineage: Lineage) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for metric, name in _METRICS.items():
        value = getattr(made.scores, metric)
        if value is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type="held-out-rows",
                dataset_name=f"{lineage.name}, test split",
                dataset_revision=lineage.data.test_sha256,
                metric_type=metric,
                metric_name=name,
                metric_value=value,
            )
