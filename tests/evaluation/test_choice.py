"""Distractors are near, different, and independent of the order of rows. Run: pytest tests/evaluation/test_choice.py"""

from tasks.evaluation.core.items import CHOICES, TestQuestion, choose_distractors, true_place, word_overlap_guess

TOPICS = {
    "files": ["copy a file tree", "remove a file tree", "move a file tree", "rename a file", "stat a file"],
    "maths": [
        "add two numbers",
        "divide two numbers",
        "round a number",
        "the root of a number",
        "the sine of a number",
    ],
}
ROWS = [
    TestQuestion(f"{topic}{i}", "docs", f"what does {topic} call number{i}{topic} do?", answer)
    for topic, answers in TOPICS.items()
    for i, answer in enumerate(answers)
]
IDS = {row.row_id for row in ROWS}


def test_the_true_answer_is_among_four_different_ones_at_its_place():
    choices = choose_distractors(ROWS, IDS)
    assert len(choices) == len(ROWS)
    for row in ROWS:
        assert choices[row.row_id][true_place(row.row_id)] == row.answer
        assert len(set(choices[row.row_id])) == CHOICES


def test_distractors_come_from_the_nearest_rows():
    choices = choose_distractors(ROWS, IDS)["files0"]
    assert set(choices) <= set(TOPICS["files"])


def test_the_order_of_rows_changes_nothing():
    assert choose_distractors(ROWS, IDS) == choose_distractors(ROWS[::-1], IDS)


def test_a_row_without_enough_different_answers_is_left_out():
    rows = [TestQuestion(str(i), "docs", f"question {i}", "yes" if i % 2 else "no") for i in range(8)]
    assert choose_distractors(rows, [row.row_id for row in rows]) == {}


def test_the_lexical_baseline_takes_the_answer_that_repeats_the_question():
    assert word_overlap_guess("remove a file tree", ["add two numbers", "a file tree is removed", "sine"]) == 1
