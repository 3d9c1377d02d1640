"""A row that holds most of an item is found; templates and short answers are no evidence."""

import numpy as np
import pytest

from tasks.data.curation.core.contamination import Detector

QUESTION = "which river flows through the old town of heidelberg before it joins the rhine at mannheim"
TEMPLATE = "answer the following multiple choice question with one letter and give no further explanation at all please"


def filler(seed, count=30):
    return " ".join(f"f{word}" for word in np.random.default_rng(seed).integers(10_000, size=count))


def run(items, rows, **settings):
    detector = Detector(items, **settings)
    detector.count(rows)
    return detector.check(rows)


def pairs(items, rows, **settings):
    return [(hit.row, hit.item) for hit in run(items, rows, **settings).hits]


def test_an_item_inside_a_longer_row_is_found_whatever_its_case():
    rows = [filler(1), f"{filler(2)} {QUESTION.upper()}? {filler(3)}", filler(4)]
    assert run([QUESTION], rows).hits == [(1, 0, 1.0)]


def test_the_share_counts_each_word_of_the_item_once():
    words = QUESTION.split()
    rows = [" ".join(words[:10]) + " " + filler(1)]
    [hit] = run([QUESTION], rows).hits
    assert hit.share == pytest.approx(10 / 16)


def test_half_of_the_item_is_not_more_than_half():
    rows = [" ".join(QUESTION.split()[:8]) + " " + filler(1)]
    assert pairs([QUESTION], rows) == []
    assert pairs([QUESTION], rows, share=0.49) == [(0, 0)]


def test_pieces_in_different_rows_do_not_add_up():
    words = QUESTION.split()
    rows = [" ".join(words[:8]) + " " + filler(1), " ".join(words[8:]) + " " + filler(2)]
    assert pairs([QUESTION], rows) == []


def test_an_instruction_that_all_rows_share_is_no_evidence():
    rows = [f"{TEMPLATE} {filler(i)}" for i in range(11)]
    assert pairs([f"{TEMPLATE} {filler(99, 10)}"], rows) == []


def test_up_to_the_limit_rows_that_share_a_run_are_evidence():
    rows = [f"{TEMPLATE} {filler(i)}" for i in range(10)]
    assert len(pairs([f"{TEMPLATE} {filler(99, 10)}"], rows)) == 10


def test_an_item_behind_a_common_instruction_is_found_by_its_own_words():
    rows = [f"{TEMPLATE} {filler(i)}" for i in range(30)]
    item = f"{TEMPLATE} {filler(7, 30)}"
    assert pairs([item], rows) == [(7, 0)]


def test_a_run_repeated_in_one_row_counts_as_one_row():
    rows = [" ".join([QUESTION] * 20)]
    assert pairs([QUESTION], rows) == [(0, 0)]


def test_the_same_short_answer_is_no_hit_and_short_items_are_counted():
    detector = Detector(["yes", "positive", "the answer is b", "", QUESTION])
    rows = ["is it so ? yes", "positive", "the answer is b", ""]
    detector.count(rows)
    assert detector.check(rows).hits == []
    assert detector.too_short == 4


def test_the_same_label_after_different_texts_is_no_hit():
    items = [f"{filler(i)} label positive" for i in range(3)]
    rows = [f"{filler(10 + i)} label positive" for i in range(3)]
    assert pairs(items, rows) == []


def test_each_pass_may_come_in_batches():
    rows = [f"{TEMPLATE} {filler(i)}" for i in range(30)]
    detector = Detector([f"{TEMPLATE} {filler(7, 30)}", filler(12)])
    for start in range(0, 30, 7):
        detector.count(rows[start : start + 7])
    found = [
        (start + hit.row, hit.item) for start in range(0, 30, 7) for hit in detector.check(rows[start : start + 7]).hits
    ]
    assert found == [(7, 0), (12, 1)]


def test_the_fullest_item_of_a_row_comes_first():
    half = " ".join(QUESTION.split()[:12]) + " tram bus bike car"
    hits = run([half, QUESTION], [QUESTION]).hits
    assert [(hit.item, hit.share) for hit in hits] == [(1, 1.0), (0, 0.75)]


def test_the_older_rule_takes_any_thirteen_words():
    words = QUESTION.split()
    rows = [" ".join(words[:13]) + " " + filler(1), " ".join(words[:12]) + " " + filler(2), filler(3)]
    assert run([QUESTION], rows).any_shared == [0]
    assert run([" ".join(words[:12])], [" ".join(words[:12])]).any_shared == []


def test_items_in_unspaced_scripts_are_found():
    item = "天地玄黄宇宙洪荒日月盈昃辰宿列张"
    assert pairs([item], ["寒来暑往" + item + "秋收冬藏", "寒来暑往"]) == [(0, 0)]


def test_no_items_and_no_rows_are_fine():
    assert run([], [QUESTION]).hits == []
    assert run([QUESTION], []).hits == []


def test_against_brute_force_on_random_rows():
    draw = np.random.default_rng(3)
    items = [" ".join(f"v{w}" for w in draw.integers(50, size=20)) for _ in range(30)]
    rows = []
    for _ in range(200):
        words = items[draw.integers(30)].split()
        cut, length = draw.integers(0, 12), draw.integers(5, 20)
        rows.append(" ".join([*filler(draw.integers(1000), 5).split(), *words[cut : cut + length]]))

    def covered(item, row):
        a, b = item.split(), row.split()
        held = {tuple(b[i : i + 8]) for i in range(len(b) - 7)}
        marks = {p for i in range(len(a) - 7) if tuple(a[i : i + 8]) in held for p in range(i, i + 8)}
        return len(marks) / len(a)

    expected = {(r, i) for r, row in enumerate(rows) for i, item in enumerate(items) if covered(item, row) > 0.5}
    assert len(expected) > 50
    assert set(pairs(items, rows, common=10_000)) == expected
