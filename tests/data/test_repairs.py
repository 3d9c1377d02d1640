"""Each repair mends what it is for and leaves its traps alone. Run: pytest tests/data/test_repairs.py"""

# The letters that look alike are the point here.
# ruff: noqa: RUF001

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.validation.core.repairs import Repair, repair

MENDED = [
    (Repair.MOJIBAKE, "caf\u00c3\u00a9 au lait", "café au lait"),
    (Repair.MOJIBAKE, "it\u00e2\u20ac\u2122s fine", "it\u2019s fine"),
    (Repair.MOJIBAKE, "\u00e4\u00bd\u00a0\u00e5\u00a5\u00bd\u00e4\u00b8\u2013\u00e7\u2022\u0152", "你好世界"),
    (Repair.HTML_ENTITIES, "Fish &amp; chips", "Fish & chips"),
    (Repair.HTML_ENTITIES, "a level &gt; 17.1", "a level > 17.1"),
    (Repair.HTML_ENTITIES, "Tom &amp;amp;amp; Jerry&#39;s", "Tom & Jerry's"),
    (Repair.HTML_ENTITIES, "He said &ldquo;hi&rdquo;", "He said \u201chi\u201d"),
    (Repair.NFC, "cafe\u0301", "café"),
    (Repair.NFC, "A\u030angstro\u0308m", "Ångström"),
    (Repair.NFC, "\u1112\u1161\u11ab", "한"),
    (Repair.LINE_ENDINGS, "one\r\ntwo", "one\ntwo"),
    (Repair.LINE_ENDINGS, "one\rtwo", "one\ntwo"),
    (Repair.LINE_ENDINGS, "one\u2028two\u2029three", "one\ntwo\nthree"),
    (Repair.CONTROL_CHARACTERS, "be\x07ep", "beep"),
    (Repair.CONTROL_CHARACTERS, "\x1b[1;31mred\x1b[0m", "red"),
    (Repair.CONTROL_CHARACTERS, "nul\x00l", "null"),
    (Repair.ZERO_WIDTH, "\ufeffhello", "hello"),
    (Repair.ZERO_WIDTH, "zero\u200bwidth and soft\u00adhyphen", "zerowidth and softhyphen"),
    (Repair.ZERO_WIDTH, "joi\u200dner and \u202eno Hebrew\u202c", "joiner and no Hebrew"),
    (Repair.SPACES, "10\u00a0km", "10 km"),
    (Repair.SPACES, "  outer and trailing \nspace ", "outer and trailing\nspace"),
    (Repair.SPACES, "layout    runs in     a sentence.", "layout runs in a sentence."),
    (Repair.SPACES, "one\n\n\n\n\ntwo", "one\n\ntwo"),
]

UNTOUCHED = [
    "",
    "Plain text.\n\n- a list\n- of two",
    "two\n\n\nblank lines are Python's style",
    "Ａ full-width Ｂ，日本語の「全角」テキスト。\n\u3000段落です。",
    "curly \u201cquotes\u201d and \u2018these\u2019, an ellipsis\u2026 and the ligature \ufb01",
    r"A literal \n is not a line break; nor is \r\n.",
    "Ça coûte 5 € à Noël, naïve façade, Ägypten, Ñandú",
    "Mojibake looks like \u00c3\u00a9.",
    "乱码是什么？例如 \u00c3\u00a9。",
    "In HTML, write &amp; for an ampersand.",
    "<p>Fish &amp; chips</p>",
    "Use `&lt;` here.",
    "```\nif (a &amp;&amp; b) {\n```",
    "if a &amp; b {\nrun();\n}",
    "int x = y;\nint z = a &amp; 1;",
    "&unknown; and &; and AT&T;",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 and flag \U0001f3f3\ufe0f\u200d\U0001f308",
    "می\u200cخواهم",
    "क्\u200dष",
    "ภาษา\u200bไทย",
    "\u200fשלום\u200e world",
    "| a    | b      |\n|------|--------|",
    "a\tb\tc",
    "```python\nx    = 1   \n\n\n\n\ny = 2\n```",
    "~~~\na    b\n~~~",
    "def f():\n    x    = 1\n    return x",
    "x = 1    # why",
    "name    age     city    country",
    "Monday\n8:00-9:30   Algebra\n\nTuesday\n9:30-11:00   Biology",
    "    indented code\n    stays indented",
    "[31m is not an escape sequence without its ESC",
]


@pytest.mark.parametrize(("name", "text", "mended"), MENDED)
def test_damage_is_mended(name, text, mended):
    assert repair(text) == (mended, (name,))


@pytest.mark.parametrize("text", UNTOUCHED)
def test_what_is_meant_stays(text):
    assert repair(text) == (text, ())


def test_repairs_are_named_in_order():
    assert repair("caf\u00c3\u00a9 &amp; bar\r\n") == (
        "café & bar",
        ("mojibake", "html_entities", "line_endings", "spaces"),
    )


def test_one_repair_lays_bare_the_work_of_another():
    assert repair("a&nbsp;b &zwj;c")[0] == "a b c"
    names = ("html_entities", "nfc", "control_characters", "zero_width")
    assert repair("e\u200b\u0301 and &am\x00p;") == ("é and &", names)


FRAGMENTS = st.sampled_from(
    [
        "&amp;",
        "&",
        "#38;",
        "lt;",
        "&nbsp;",
        "\u00c3",
        "\u00a9",
        "\u00e2\u20ac\u2122",
        "\r",
        "\n",
        "\x1b[",
        "31m",
        "\x1b]",
        "\x07",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u00ad",
        "\u202e",
        "ש",
        "e",
        "\u0301",
        " ",
        "   ",
        "\u00a0",
        "\u3000",
        "\t",
        "|",
        "```",
        "~~~",
        "    ",
        "a",
        "b.",
        "# ",
        "ก",
        "\u0344",
        "\u2028",
        "\x85",
        "\x1c",
        "&#13;",
        "&#65279;",
        "&#x85;",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(), st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=25).map("".join)))
def test_repair_is_idempotent_on_any_text(text):
    mended, names = repair(text)
    assert repair(mended) == (mended, ())
    assert (mended != text) <= bool(names)
    assert set(names) <= set(Repair)
