"""How far a challenger's answers are from the champion's, on the questions that users asked."""

from collections.abc import Sequence
from statistics import fmean, median

import numpy as np

from data_contracts.shadow_reports import Difference, Given, Pair, ShadowReport, Side
from tasks.evaluation.core.stats import proportion
from tasks.evaluation.core.text_scores import exact_match, rouge_l

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


def _side(answers: Sequence[Given]) -> Side:
    return Side(
        version=answers[0].version,
        tokens=fmean(one.tokens for one in answers),
        ms_per_token=median(one.seconds * 1000 / max(1, one.tokens) for one in answers),
        stopped=proportion(np.array([one.stopped for one in answers], float), _CONFIDENCE),
    )


def _texts(pair: Pair) -> tuple[str, str, str]:
    return pair.messages[-1]["content"], pair.champion.answer, pair.challenger.answer
