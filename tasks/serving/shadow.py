"""Compare the answers that the shadow has kept: champion against challenger, question by question."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import numpy as np
from pydantic import ValidationError

from data_contracts.errors import ConfigError, DataError, Problem
from data_contracts.releases import Difference, Pair, ShadowAnswer, ShadowReport, Side
from data_contracts.run_spec import StoreSpec
from tasks.evaluation.core.stats import proportion
from tasks.evaluation.core.text_scores import exact_match, rouge_l
from tasks.serving.endpoint import shadow_file


def compare_shadow(store: StoreSpec, name: str) -> tuple[ShadowReport, Path]:
    """Compare the newest pair of versions; also the file it was read from. Raises ConfigError if nothing was kept."""
    file = shadow_file(store, name)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if not lines:
        act = f"tunegate serve {name}@champion --shadow {name}@challenger, and ask it"
        raise ConfigError(Problem(f"no question to {name} was answered in the shadow yet", str(file), act=act))
    return compare_pairs([_pair(line, place, file) for place, line in enumerate(lines, 1)]), file


def _pair(line: str, place: int, file: Path) -> Pair:
    try:
        return Pair.model_validate_json(line)
    except ValidationError as error:
        what = f"line {place} is not one that the shadow wrote: {error.errors()[0]['msg']}"
        raise DataError(Problem(what, str(file), act="remove the line")) from error


_CONFIDENCE = 0.95
_SHOWN = 3


def compare_pairs(pairs: Sequence[Pair]) -> ShadowReport:
    """The two versions of the newest pair, over all that both have answered. pairs: at least one, oldest first."""
    versions = _versions(pairs[-1])
    mine = [pair for pair in pairs if _versions(pair) == versions]
    near = [rouge_l(pair.champion.answer, pair.challenger.answer) for pair in mine]
    same = [exact_match(pair.champion.answer, pair.challenger.answer) == 1 for pair in mine]
    apart = {_texts(pair): score for pair, alike, score in zip(mine, same, near, strict=True) if not alike}
    return ShadowReport(
        prompts=len(mine),
        since_unix_seconds=mine[0].unix_seconds,
        until_unix_seconds=mine[-1].unix_seconds,
        champion=_side([pair.champion for pair in mine]),
        challenger=_side([pair.challenger for pair in mine]),
        same=proportion(np.array(same, float), _CONFIDENCE),
        # Two empty answers are alike, though ROUGE gives 0 where there is no word.
        rouge_l=fmean(1.0 if alike else score for alike, score in zip(same, near, strict=True)),
        most_different=[
            Difference(question=texts[0], champion=texts[1], challenger=texts[2], rouge_l=apart[texts])
            for texts in sorted(apart, key=lambda texts: apart[texts])[:_SHOWN]
        ],
        other_pairs=len({_versions(pair) for pair in pairs}) - 1,
    )


def _versions(pair: Pair) -> tuple[str, str]:
    return pair.champion.version, pair.challenger.version


def _side(answers: Sequence[ShadowAnswer]) -> Side:
    return Side(
        version=answers[0].version,
        tokens=fmean(one.tokens for one in answers),
        ms_per_token=median(one.seconds * 1000 / max(1, one.tokens) for one in answers),
        stopped=proportion(np.array([one.stopped for one in answers], float), _CONFIDENCE),
    )


def _texts(pair: Pair) -> tuple[str, str, str]:
    return pair.messages[-1]["content"], pair.champion.answer, pair.challenger.answer
