"""Shingles are what `words` says, near pairs are what brute force finds, and the order of the rows is no matter."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.curation.core import minhash as near
from tasks.data.curation.core.minhash import components, near_pairs, signatures, similar
from tasks.data.curation.core.shingles import gram_hashes, shingle_hashes, to_offsets, word_hashes, words

TRICKY = st.text(
    alphabet=st.sampled_from("aB1_ .,\n\t\x1e\x00ßéÅe\u0301\u0345ไทยักขคé한글日本ﬁ\U0001f600\U00020000\ud800"),
    max_size=30,
)


def fetcher(flat, offsets):
    def fetch(rows):
        pieces = [flat[offsets[row] : offsets[row + 1]] for row in rows]
        return np.concatenate([flat[:0], *pieces]), to_offsets(np.array([len(p) for p in pieces], np.int64))

    return fetch


def pairs_of(texts, threshold, size=3):
    flat, offsets = shingle_hashes(texts, size)
    return near_pairs(signatures(flat, offsets, threshold), fetcher(flat, offsets), threshold)


def grams(text, size=3):
    found = words(text)
    return {tuple(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else set()


def brute_force(texts, threshold):
    """Sorted pairs by sets of tuples of words: nothing is shared with the code under test but `words`."""
    sets = [grams(text) for text in texts]
    holders = [(i, j) for j in range(len(sets)) for i in range(j) if sets[i] & sets[j]]
    return {(i, j) for i, j in holders if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= threshold}


def toy_texts(seed, families=120, length=60):
    """Families of texts with none to a third of their words changed, so that similarities of all sizes occur."""
    draw = np.random.default_rng(seed)
    texts = []
    for _ in range(families):
        original = draw.integers(5000, size=length)
        for changes in (0, 0, 1, 2, 3, 4, 6, 9, 20):
            copy = original.copy()
            copy[draw.integers(length, size=changes)] = draw.integers(5000, size=changes)
            texts.append(" ".join(f"w{word}" for word in copy))
    return texts


def hot_texts(count, threshold_side=1):
    """`count` texts of one boilerplate of 60 words with `threshold_side` words of their own."""
    template = " ".join(f"t{i}" for i in range(60))
    return [f"{template} " + " ".join(f"own{i}x{k}" for k in range(threshold_side)) for i in range(count)]


@given(st.lists(TRICKY, max_size=6))
@settings(max_examples=200, deadline=None)
def test_hashes_tell_apart_the_words_of_the_pattern_and_nothing_else(texts):
    hashes, offsets = word_hashes(texts)
    expected = [words(text) for text in texts]
    assert np.diff(offsets).tolist() == [len(found) for found in expected]
    names = [word for found in expected for word in found]
    pairs = set(zip(names, hashes.tolist(), strict=True))
    assert len(pairs) == len({name for name, _ in pairs}) == len({number for _, number in pairs})


@given(st.lists(TRICKY, max_size=6), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_shingles_are_the_sorted_set_of_word_runs(texts, size):
    flat, offsets = shingle_hashes(texts, size)
    parts = [flat[offsets[i] : offsets[i + 1]] for i in range(len(texts))]
    assert [len(part) for part in parts] == [len(grams(text, size)) for text in texts]
    assert all((part[1:] > part[:-1]).all() for part in parts)
    alone = [shingle_hashes([text], size)[0].tolist() for text in texts]
    assert [part.tolist() for part in parts] == alone


def test_a_batch_border_changes_no_hash():
    texts = [f"row {i} " + "some words " * 3000 for i in range(20)]
    flat, offsets = shingle_hashes(texts, 3)
    assert flat[offsets[13] : offsets[14]].tolist() == shingle_hashes([texts[13]], 3)[0].tolist()


def test_the_order_of_words_counts_in_a_run():
    hashes, offsets = word_hashes(["a b c", "c b a", "b c a"])
    assert len(set(gram_hashes(hashes, offsets, 3)[0].tolist())) == 3


def test_hashes_are_the_same_in_another_process():
    code = "from tasks.data.curation.core.shingles import shingle_hashes; print(shingle_hashes(['One two, 三 สวัสดี four'], 2)[0].tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(shingle_hashes(["One two, 三 สวัสดี four"], 2)[0].tolist())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("日本語 ok", ["日", "本", "語", "ok"]),
        ("한국어", ["한", "국", "어"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("E\u0301TÉ, straße_1!", ["été", ",", "strasse_1", "!"]),
        (" \n", []),
    ],
)
def test_words_are_runs_of_letters_or_single_characters_or_signs(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_are_those_of_brute_force(threshold):
    texts = toy_texts(int(threshold * 100))
    found, expected = set(map(tuple, pairs_of(texts, threshold).tolist())), brute_force(texts, threshold)
    assert len(expected) > 100
    assert found <= expected
    assert len(found) >= 0.97 * len(expected)


def test_the_order_of_the_rows_changes_no_pair():
    texts = toy_texts(3, families=40)
    order = np.random.default_rng(1).permutation(len(texts))
    shuffled = pairs_of([texts[i] for i in order], 0.8)
    before = {frozenset(pair) for pair in pairs_of(texts, 0.8).tolist()}
    assert {frozenset(order[pair].tolist()) for pair in shuffled} == before


def test_near_copies_in_scripts_without_spaces_are_found():
    for script in (
        "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏",
        "สวัสดีครับยินดีต้อนรับสู่ประเทศไทย",
        "대한민국은민주공화국이다모든국민은",
    ):
        assert pairs_of([script * 2, script * 2 + "好", "something else entirely here"], 0.8).tolist() == [[0, 1]]


def test_texts_without_words_are_near_to_none():
    assert pairs_of(["", " ", "a b c", ""], 0.8).tolist() == []
    assert pairs_of([], 0.8).shape == (0, 2)


def test_a_hot_bucket_of_near_copies_is_one_component():
    texts = [*hot_texts(450), "nothing like the others"]
    found = components(len(texts), pairs_of(texts, 0.8))
    assert found.tolist() == [0] * 450 + [450]


def test_work_in_a_hot_bucket_does_not_grow_with_its_square(monkeypatch):
    compared = []
    monkeypatch.setattr(near, "similar", lambda pairs, *rest: compared.append(len(pairs)) or similar(pairs, *rest))
    pairs_of(hot_texts(1500), 0.8)
    assert 1499 <= sum(compared) < 60 * 1500 < 1500 * 1499 / 2


def test_boilerplate_below_the_threshold_joins_no_rows():
    texts = hot_texts(450, threshold_side=20)
    assert brute_force(texts[:5], 0.8) == set()
    assert len(pairs_of(texts, 0.8)) == 0


def hot_families():
    """Boilerplate of 60 words with six of a family's own and up to four words changed: many pairs are at the threshold."""
    draw = np.random.default_rng(5)
    texts = []
    for family in range(500):
        original = [*(f"t{i}" for i in range(60)), *(f"own{family}x{i}" for i in range(6))]
        for changes in (0, 4, 4):
            copy = list(original)
            for place in draw.integers(66, size=changes):
                copy[place] = f"new{draw.integers(10**9)}"
            texts.append(" ".join(copy))
    return texts


def test_components_of_a_hot_bucket_do_not_depend_on_the_order_of_the_rows():
    texts = hot_families()
    order = np.random.default_rng(2).permutation(len(texts))

    def groups(these, names):
        labels = components(len(these), pairs_of(these, 0.8))
        return {frozenset(names[i] for i in np.flatnonzero(labels == label)) for label in set(labels.tolist())}

    assert groups(texts, list(range(len(texts)))) == groups([texts[i] for i in order], order.tolist())


@given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=20))
def test_components_are_named_after_their_smallest_row(edges):
    labels = list(range(15))
    for _ in range(15):
        for a, b in edges:
            labels[a] = labels[b] = min(labels[a], labels[b])
    assert components(15, np.array(edges, np.int64).reshape(-1, 2)).tolist() == labels


def test_similarity_is_exact_at_the_threshold():
    flat, offsets = shingle_hashes(["a b c d", "a b c e", "a b"], 1)
    pairs = np.array([[0, 1], [0, 2]])
    assert similar(pairs, fetcher(flat, offsets), 0.6).tolist() == [True, False]
    assert similar(pairs, fetcher(flat, offsets), 0.5).tolist() == [True, True]
