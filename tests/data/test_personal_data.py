"""Each kind of personal data is found and its traps are let through; languages are distinguished.

Run: pytest tests/data/test_personal_data.py. Secrets are put together here, so that no scanner takes this file for a leak.
"""

# The letters that look alike are the point here.
# ruff: noqa: RUF001

import socket
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.data.validation.core.languages import language
from tasks.data.validation.core.personal_data import PersonalDataKind, find_personal_data, is_about_personal_data, mask

RANDOM = "q7Zr2Lw9Xk4Tb8Nv3Mc6Hd1Js5Gf0Py7Ru2Ea9Wo4"
PEM = "-----BEGIN RSA PRIV" + "ATE KEY-----\n" + "MIIEow" + RANDOM * 2 + "\n-----END RSA PRIV" + "ATE KEY-----"
JWT = "eyJ" + "hbGciOiJSUzI1NiJ9.eyJ" + "pc3MiOiJhY21lIn0." + RANDOM

CAUGHT = [
    (PersonalDataKind.EMAIL, "ada.lovelace@math.org"),
    (PersonalDataKind.EMAIL, "Write to h.muster+x@uni-koeln.de.", "h.muster+x@uni-koeln.de"),
    (PersonalDataKind.EMAIL, "联系 liwei88@163.com 谢谢", "liwei88@163.com"),
    (PersonalDataKind.PHONE, "+44 20 7219 4272"),
    (PersonalDataKind.PHONE, "Call me at (212) 736-5000 tonight", "(212) 736-5000"),
    (PersonalDataKind.PHONE, "手机 13912348765", "13912348765"),
    (PersonalDataKind.PHONE, "+49 30 227 32152"),
    (PersonalDataKind.CARD, "4539 5787 6362 1486"),
    (PersonalDataKind.CARD, "5425-2334-3010-9911"),
    (PersonalDataKind.CARD, "My card 379354508162306 was lost", "379354508162306"),
    (PersonalDataKind.NATIONAL_ID, "536-22-8714"),
    (PersonalDataKind.NATIONAL_ID, "SSN 536 22 8714", "536 22 8714"),
    (PersonalDataKind.NATIONAL_ID, "身份证 11010519491231002X", "11010519491231002X"),
    (PersonalDataKind.NATIONAL_ID, "National Insurance AB 47 31 56 C", "AB 47 31 56 C"),
    (PersonalDataKind.NATIONAL_ID, "NHS number 943 476 5870", "943 476 5870"),
    (PersonalDataKind.IBAN, "DE75512108001245126199"),
    (PersonalDataKind.IBAN, "GB94 BARC 1020 1530 0934 59"),
    (PersonalDataKind.IBAN, "Pay to AT48 3200 0000 1234 5864 TODAY", "AT48 3200 0000 1234 5864"),
    (PersonalDataKind.IP, "81.2.69.142"),
    (PersonalDataKind.IP, "ping 5.9.3.1 first", "5.9.3.1"),
    (PersonalDataKind.IP, "http://203.98.7.65:8080/x", "203.98.7.65"),
    (PersonalDataKind.IP, "2a00:1450:4001:81b::200e"),
    (PersonalDataKind.SECRET, "AK" + "IAQ7ZR2LW9XK4TB8NV"),
    (PersonalDataKind.SECRET, "gh" + "p_" + RANDOM[:36]),
    (PersonalDataKind.SECRET, "github" + "_pat_" + RANDOM + RANDOM[:20]),
    (PersonalDataKind.SECRET, "xo" + "xb-" + "2847561903-" + RANDOM[:24]),
    (PersonalDataKind.SECRET, "AI" + "za" + RANDOM[:35]),
    (PersonalDataKind.SECRET, "sk" + "-ant-" + RANDOM),
    (PersonalDataKind.SECRET, "h" + "f_" + RANDOM[:34]),
    (PersonalDataKind.SECRET, "sk" + "_live_" + RANDOM[:24]),
    (PersonalDataKind.SECRET, JWT),
    (PersonalDataKind.SECRET, PEM),
    (PersonalDataKind.SECRET, 'api_key = "' + RANDOM + '"', RANDOM),
    (PersonalDataKind.SECRET, "'password': '" + "tR9#kw2!Lq7$Zx4b'", "tR9#kw2!Lq7$Zx4b"),
]

LET_THROUGH = [
    "",
    "no data at all",
    "user@example.com",
    "jane@shop.test",
    "root@localhost",
    "username@domain.com",
    "your.name@gmail.com",
    "info@ninds.nih.gov",
    "git@github.com:owner/repo.git",
    "logo@2x.png",
    "self.a@self.weight",
    "john.doe@gmail.com",
    "https://user:pass@host.org/x",
    "Call 555-0123",
    "call (212) 555-0147",
    "+44 20 7946 0958",
    "call 1-800-352-9424",
    "call me on 2023-01-15",
    "ISBN 978-3-16-148410-0",
    "contact us, order 2127365000",
    "version 10.0.19041.1288",
    "2127365000",
    "电话 13800138000",
    "phone: 123-456-7890",
    "4111 1111 1111 1111",
    "4242424242424242",
    "4539 5787 6362 1487",
    "9999 5787 6362 1486",
    "order 4539578763621486",
    "3.1415926535897932",
    "1234-5678-9012-3456",
    "123-45-6789",
    "078-05-1120",
    "000-12-3456",
    "666-12-3456",
    "536 22 8714",
    "110105194912310021",
    "National Insurance QQ 12 34 56 C",
    "AB473156C",
    "943 476 5870",
    "GB82 WEST 1234 5698 7654 32",
    "DE89370400440532013000",
    "DE75512108001245126198",
    "192.168.1.17",
    "127.0.0.1",
    "10.20.30.40",
    "203.0.113.77",
    "8.8.8.8",
    "version 81.2.69.142",
    "v12.34.56.78",
    "see 4.1.2.3",
    "999.20.30.40",
    "2001:db8::17",
    "std::fe::ab",
    "12:30:45",
    "AK" + "IAIOSFODNN7EXAMPLE",
    "gh" + "p_" + "x" * 36,
    "sk" + "-learn-is-a-good-library-indeed",
    "task-force-number-2-of-the-committee",
    "sk" + "-your-key-here-1234567890",
    "h" + "f_" + "hub_download",
    "eyJ0aGlz",
    "-----BEGIN PUBLIC KEY-----",
    "-----BEGIN PRIV" + "ATE KEY-----\n...\n-----END PRIV" + "ATE KEY-----",
    'api_key = "YOUR_API_KEY"',
    'password = "<your-password-goes-here>"',
    'token = "xxxxxxxxxxxxxxxx1A"',
    'password = "password123"',
    'password: "{{ vault_password_1A }}"',
    "api_key=os.environ['API_KEY_2']",
    "1990-2020",
    "1,234,567,890 people",
    "10:00 - 12:30",
]


@pytest.mark.parametrize("case", CAUGHT, ids=lambda case: f"{case[0]}-{case[1][:12]!a}")
def test_is_found_and_masked(case):
    kind, text, value = case if len(case) == 3 else (*case, case[1])
    found = find_personal_data(f"{text}\n")
    assert [(one.kind, text[one.start : one.end], one.secret) for one in found] == [
        (kind, value, kind is PersonalDataKind.SECRET)
    ]
    masked = mask(text, found)
    assert masked == text.replace(value, f"[{kind}]")
    assert not find_personal_data(masked)


@pytest.mark.parametrize("text", LET_THROUGH)
def test_a_trap_is_let_through(text):
    assert find_personal_data(text) == []


def test_several_finds_stand_in_order():
    text = "Mail ada@math.org or call +44 20 7219 4272 from 81.2.69.142"
    assert mask(text, find_personal_data(text)) == "Mail [EMAIL] or call [PHONE] from [IP]"


def test_what_a_find_hides_is_found_too():
    text = "ada@math.org+44 20 7219 4272"
    assert mask(text, find_personal_data(text)) == "[EMAIL][PHONE]"


ALL_CASES = [case[1] for case in CAUGHT] + LET_THROUGH
PIECES = st.one_of(
    st.sampled_from(ALL_CASES),
    st.text("0123456789 .-+()@:/abcEG[]\"'", max_size=24),
    st.sampled_from([" ", ",", "call ", "phone", "ssn ", "v", "\n", "[", "]"]),
    st.text(max_size=4),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_masking_leaves_nothing_to_find(text):
    found = find_personal_data(text)
    spans = [(one.start, one.end) for one in found]
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert find_personal_data(mask(text, found)) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "Redact the names.",
        "Please anonymise this letter",
        "Extract all email addresses from the text",
        "Identify the phone numbers below",
        "Write a regex to validate a credit card",
        "提取文中的手机号",
        "对下列病历做脱敏处理",
    ],
)
def test_a_task_about_personal_data_is_told(prompt):
    assert is_about_personal_data(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "Write an email to my boss",
        "Summarise the text.",
        "Who invented the telephone?",
        "Remove the duplicates from the list",
        "写一封邮件",
        "Find the capital of France. Then call a phone.",
        "Where do I find my credit card?",
        "How do I get a Visa credit card",
        "过敏性鼻炎可以做脱敏治疗吗",
    ],
)
def test_another_task_is_not(prompt):
    assert not is_about_personal_data(prompt)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The quick brown fox jumps over the lazy dog.", "en"),
        ("Der Hund liegt seit heute Morgen unter dem Tisch.", "de"),
        ("Le café où j’ai mangé hier soir était très agréable.", "fr"),
        ("我今天很高兴见到你们", "zh"),
        ("我今天很高興見到你們，謝謝大家", "zh"),
        ("これは日本語の文章です", "ja"),
        ("Почему небо голубое, а трава зелёная?", "ru"),
        ("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG", "en"),
        ("Why does this fail with an error?\n```\nfür = 'der die das und nicht'\n```", "en"),
        ("too short", None),
        ("短文本", None),
        ("", None),
        ("```\nprint('hello world, this is a test')\n```", None),
        ("https://example.com/a/very/long/path/of/words 12345678901234567890", None),
    ],
)
def test_language(text, code):
    assert language(text) == code


def test_language_needs_no_network_and_prints_nothing(monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    from tasks.data.validation.core.languages import _detector

    _detector.cache_clear()
    assert language("The model lies in the package and is read from there.") == "en"
    assert capfd.readouterr() == ("", "")
