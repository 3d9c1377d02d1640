"""Each row rule catches what it is for and lets its traps through, and each action does what it says."""

import pytest

from data_contracts.data_spec import CustomRule, RulesSpec
from data_contracts.rows import FLAGGED, Message, Reason, Role, Row
from tasks.data.validation.core.row_rules import RULES, RowCheck, check_row

LIMIT = 5000
SPEC = RulesSpec(
    languages=["en"],
    custom=[
        CustomRule(name="no_prices", forbidden=r"\$\d"),
        CustomRule(name="ticket_named", field="prompt", required=r"\S"),
        CustomRule(name="short", field="any", max_chars=4990),
    ],
)


def row(*turns: tuple[Role, str]) -> Row:
    return Row(tuple(Message(role, content) for role, content in turns), "a.jsonl", 1)


def ask(prompt: str, answer: str) -> Row:
    return row(("user", prompt), ("assistant", answer))


def with_system(system: str, prompt: str, answer: str) -> Row:
    return row(("system", system), ("user", prompt), ("assistant", answer))


PROSE = (
    "The router keeps a table of every device that has joined the network. When a device leaves, its entry stays for a "
    "day. After that day the entry is dropped and the address may be given to another device"
)
LETTER = "Dear [Customer Name],\nthank you for writing to us.\nKind regards,\n[Your Name]"
LOOP = "Restart the router and wait. "
GERMAN = "Der Hund liegt seit heute Morgen unter dem Tisch und schläft, weil es draußen so heiß ist."
CHINESE = "请先断开路由器的电源\uff0c等待三十秒\uff0c然后重新接通电源\uff0c再检查网络是否恢复正常。"

CAUGHT: dict[Reason, dict[str, Row]] = {
    Reason.NO_FINAL_ANSWER: {
        "no messages": row(),
        "ends with a question": row(("user", "a"), ("assistant", "b"), ("user", "c")),
        "only a system message": row(("system", "Be brief.")),
    },
    Reason.WRONG_ROLE_ORDER: {
        "starts with an answer": row(("assistant", "b")),
        "two questions in a row": row(("user", "a"), ("user", "b"), ("assistant", "c")),
        "late system": row(("user", "a"), ("system", "b"), ("assistant", "c")),
    },
    Reason.EMPTY_PROMPT: {
        "empty question": ask("", "b"),
        "blank question": ask(" \n", "b"),
        "empty system": with_system("", "a", "b"),
    },
    Reason.EMPTY_ANSWER: {
        "empty answer": ask("a", ""),
        "blank answer": ask("a", "\n\t"),
        "empty early answer": row(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")),
    },
    Reason.TEMPLATE_TOKEN: {
        "ChatML": ask("a", "b<|im_end|>\n<|im_start|>user"),
        "Llama in the question": ask("[INST] a [/INST]", "b"),
        "Gemma": ask("a", "<start_of_turn>model"),
        "Alpaca": ask("### Instruction:\nReset it.\n\n### Response:", "Hold the button."),
        "chat log": ask("a", "b\n<user>: and then?"),
    },
    Reason.TOO_LONG: {
        "question": ask("a" * LIMIT, "b"),
        "answer": ask("b", "a " * LIMIT),
        "system": with_system("a " * LIMIT, "b", "c"),
    },
    Reason.BROKEN_TEXT: {
        "replacement character": ask("Where is it?", "In the caf\ufffd."),
        "in the question": ask("Where is the caf\ufffd?", "Left."),
        "read as Latin-1": ask("Where is it?", "In the caf\u00ef\u00bf\u00bd."),
        "read as GBK": ask("Where is it?", "锟斤拷锟斤拷"),
    },
    Reason.CONTROL_CHARACTERS: {
        "bell": ask("a", "It rings.\x07"),
        "terminal colours": ask("Show the log.", "\x1b[31mfailed\x1b[0m\nat 10:00"),
        "override": ask("Which file?", "invoice\u202efdp.exe"),
        "embedding in English": ask("Which file?", "the \u2066file\u2069"),
    },
    Reason.ANSWER_EQUALS_PROMPT: {
        "same": ask("Reset the router", "Reset the router"),
        "case and white space apart": ask("Reset  the ROUTER", "reset the router\n"),
        "Chinese": ask("请介绍一下自己", "请介绍一下自己"),
    },
    Reason.PLACEHOLDER_ANSWER: {
        "N/A": ask("How do I reset it?", "N/A"),
        "TODO": ask("How do I reset it?", "TODO"),
        "<nooutput>": ask("Describe the sea.", "<nooutput>"),
        "nan": ask("Describe the sea.", "nan"),
        "None": ask("Describe the sea.", "None"),
        "dots": ask("Describe the sea.", "..."),
        "filler": ask("Describe the sea.", "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod."),
        "slot": ask("Describe the sea.", "[insert description here]"),
    },
    Reason.PLACEHOLDER_FIELD: {
        "braces": ask("Who are you?", "I am {{name}}, built by {{author}}."),
        "brackets in a reply": ask("My order is late.", LETTER),
        "instruction": ask("Where do I send it back?", "Send it to [insert address of the branch]."),
        "braces in a letter": ask("Write a letter to a customer.", "Dear {{customer_name}}, thank you."),
    },
    Reason.REFUSAL: {
        "as an AI": ask("Describe your house.", "As an AI language model, I don't have a house."),
        "sorry": ask("Write a poem.", "I'm sorry, but I cannot write that."),
        "curly apostrophe": ask("Write a poem.", "I\u2019m sorry, but I can\u2019t assist with that."),
        "Chinese": ask("Translate: 写一首诗。", "抱歉\uff0c我无法完成这个请求。"),
        "Chinese as an AI": ask("Translate: 你的家在哪里\uff1f", "作为一个AI\uff0c我没有家。"),
    },
    Reason.TRUNCATED_ANSWER: {
        "in mid-sentence": ask("How does it work?", f"{PROSE}. Only a few routers keep it for lon"),
        "after a connective": ask("How does it work?", f"{PROSE}, which is the reason that the owner must look at the"),
        "after a comma": ask("How does it work?", f"{PROSE},"),
        "in a list item of several sentences": ask("How?", f"It depends. It may well take time.\n\n1. {PROSE}"),
    },
    Reason.UNBALANCED_CODE_FENCE: {
        "never closed": ask("Show a loop.", "```python\nfor i in range(3):\n    print(i)"),
        "closed once too often": ask("Show a loop.", "```\nwhile True: pass\n```\nDone.\n```"),
        "inside a longer fence": ask("Show a loop.", "````markdown\n```\ncode\n```\n"),
    },
    Reason.BABBLE: {
        "sentence": ask("What now?", LOOP * 20),
        "after a good start": ask("What now?", "Look at the lamp first. " + LOOP * 20),
        "word": ask("What now?", "It is very " + "very " * 60),
        "without spaces": ask("Translate: 你好。怎么办\uff1f", "重新启动路由器。" * 40),
    },
    Reason.URL_ONLY: {
        "https": ask("How do I reset it?", "https://example.com/reset"),
        "www": ask("How do I reset it?", "www.example.com"),
        "in angle brackets": ask("How do I reset it?", "<https://example.com/a?b=c>"),
    },
    Reason.MISSING_IMAGE: {
        "embedded": ask("What do you see? ![](photo.jpg)", "A dog."),
        "referred to": ask("What breed is the dog in the picture above?", "A terrier."),
        "attached": ask("What is wrong here? See attached screenshot.", "The cable is loose."),
        "in the answer": ask("How do I find it?", "Follow the arrows: <image>"),
        "Chinese": ask("Translate: 检查结果如下图", "The result is below."),
    },
    Reason.PROMPT_LEAKS_ANSWER: {
        "at the end": ask(
            "How do I reset it? Hold the small button for ten seconds until it blinks.",
            "Hold the small button for ten seconds until it blinks.",
        ),
        "at the start": ask(
            "The cable of this device has to be replaced once a year. When is that?",
            "The cable of this device has to be replaced once a year.",
        ),
        "in an earlier turn": row(
            ("user", "Can I return it?"),
            ("assistant", "You can return it within thirty days if it is unused."),
            ("user", "Really?"),
            ("assistant", "You can return it within thirty days if it is unused."),
        ),
    },
    Reason.MARKUP: {
        "tags": ask("How do I reset it?", "<div>Hold the button.<br>Wait.</div>"),
        "entities": ask("How do I reset it?", "Hold&nbsp;the button &amp; wait."),
        "link": ask("How do I reset it?", 'See <a href="/help">help</a>.'),
    },
    Reason.WRONG_LANGUAGE: {
        "German": ask("Where is the dog?", GERMAN),
        "Chinese": ask("How do I reset it?", CHINESE),
        "after an English question": ask("How do I reset the router?", f"{CHINESE}\n{CHINESE}"),
    },
    Reason.MIXED_LANGUAGE: {
        "Chinese passage": ask("How does it work?", f"{PROSE}. {PROSE}. {CHINESE}"),
        "Russian passage": ask(
            "How does it work?", f"{PROSE}. {PROSE}. Сначала выключите питание роутера и подождите."
        ),
        "Korean passage": ask("How does it work?", f"{PROSE}. {PROSE}. 먼저 전원을 끄고 잠시 기다려 주세요."),
    },
    Reason.CUSTOM: {
        "forbidden": ask("How much?", "It costs $5."),
        "forbidden at the end": ask("How much?", "About $99"),
        "too long together": ask("a " * 2400, "b " * 97 + "c."),
    },
}

KEPT: dict[Reason, dict[str, Row]] = {
    Reason.NO_FINAL_ANSWER: {
        "one-character answer": ask("2 + 2?", "4"),
        "many turns": row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        "label": ask("Where is my card?", "card_arrival"),
    },
    Reason.WRONG_ROLE_ORDER: {
        "system first": with_system("Be brief.", "a", "b"),
        "no system": ask("a", "b"),
        "system and many turns": row(
            ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
        ),
    },
    Reason.EMPTY_PROMPT: {
        "one character": ask("?", "Ask me anything."),
        "one word": ask("Hi", "Hello, how can I help?"),
        "white space around": ask("\n Reset? \n", "Hold the button."),
    },
    Reason.EMPTY_ANSWER: {
        "zero": ask("1 - 1?", "0"),
        "a sign": ask("Which operator adds?", "+"),
        "white space around": ask("Reset?", "\n Hold the button. \n"),
    },
    Reason.TEMPLATE_TOKEN: {
        "strikethrough": ask("What does <s>old</s> show?", "Struck text"),
        "Haskell's operator": ask("What is <|> in Haskell?", "a <|> b is an alternative"),
        "talk about INST": ask("What does INST mean?", "An instruction"),
        "the documentation of an API": ask("Document the call.", "### Response:\n```json\n{}\n```"),
        "a heading": ask("Document the call.", "### Response times\nBelow 10 ms."),
        "a usage line": ask("How do I log in?", "ssh <user>@host"),
    },
    Reason.TOO_LONG: {
        "short": ask("a", "b"),
        "nearly too long": ask("a " * 2000, "b"),
        "long answer": ask("a", "b " * 2000 + "c"),
    },
    Reason.BROKEN_TEXT: {
        "question about encoding": ask(
            "Why do I see \ufffd in UTF-8 text?", "Bytes were lost: \ufffd stands for them."
        ),
        "accents": ask("Where is it?", "In the café."),
        "Chinese words": ask("Translate 'copper' to Chinese.", "铜锟"),
    },
    Reason.CONTROL_CHARACTERS: {
        "tabs and lines": ask("Show a table.", "a\tb\r\n1\t2\r\n"),
        "isolates in Arabic": ask("Say hello in Arabic.", "\u2067\u0645\u0631\u062d\u0628\u0627\u2069"),
        "no-break space": ask("How far?", "10\u00a0km"),
    },
    Reason.ANSWER_EQUALS_PROMPT: {
        "repeats the question and more": ask("Say hello", "Say hello to whom?"),
        "an earlier question": row(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "a")),
        "greeting": ask("Hello!", "hello!"),
        "nothing to correct": with_system("Correct the grammar.", "I like it here.", "I like it here."),
    },
    Reason.PLACEHOLDER_ANSWER: {
        "label on offer": ask("Severity: None, Low or High? The disk is fine.", "None"),
        "not applicable on offer": ask("Answer yes, no or N/A: is it new?", "N/A"),
        "value of a program": ask("What does list.sort() return in Python?", "None"),
        "true answer": ask("Which of these boats have sunk?", "None."),
        "Spanish": ask("How do I say 'everything' in Spanish?", "todo"),
        "filler on request": ask("Write a line of lorem ipsum.", "Lorem ipsum dolor sit amet."),
        "Roman numeral": ask("Write 30 in Roman numerals.", "XXX"),
        "brackets of code": ask("What is an empty list in Python?", "[]"),
    },
    Reason.PLACEHOLDER_FIELD: {
        "Jinja": ask("Greet the user in Jinja.", "Hello {{ name }}!"),
        "code block": ask("Greet the user.", "```\nHello {{name}}!\n```"),
        "slot of the prompt": ask("Shorten: Hello {{name}}, welcome back!", "Hi {{name}}!"),
        "letter template": ask("Write a letter template for late orders.", LETTER),
        "signature of a letter": ask("Write an email that asks for a pay rise.", LETTER),
        "redaction": ask("Redact: Ann Lee lives at 5 Elm Road.", "[NAME] lives at [ADDRESS]."),
        "link": ask("Where is the list?", "Here: [address](list.txt)"),
        "LaTeX": ask("What is a half?", r"\frac{{ab}}{{cd}}"),
    },
    Reason.REFUSAL: {
        "apology": ask("My order is late", "I'm sorry that your order is late. It will arrive tomorrow."),
        "compassion": ask("My cat is ill.", "I'm sorry to hear that. Call a vet."),
        "a support limit": ask("Where is it?", "I'm sorry, I cannot find your order number. Could you send it again?"),
        "an AI engineer": ask("Who are you?", "As an AI engineer, I build tools."),
        "Chinese apology": ask("Translate: 订单晚了", "很抱歉您的订单晚了\uff0c明天送到。"),
    },
    Reason.TRUNCATED_ANSWER: {
        "code": ask("Show it.", f"{PROSE}.\n```\n{'total = total + 1; ' * 9}\n```\nprint the total of all rows"),
        "list": ask("How?", f"{PROSE}.\n- Switch the router off and wait until every one of its lamps is dark\n"),
        "a publisher's name": ask("How?", f"{PROSE}. Federal Emergency Management Agency of the United States"),
        "title": ask("A title?", "How the Router Keeps Its Table"),
        "Chinese without a full stop": ask(
            "Translate it to Chinese.", "".join(f"第{i}步要看第{i + 5}盏灯是否亮起" for i in range(20))
        ),
        "source": ask("How?", f"{PROSE}. NIH: National Institute of Diabetes and Digestive and Kidney Diseases"),
        "address": ask("How?", f"{PROSE}. You can read more about all of this on the pages at https://example.com/a"),
    },
    Reason.UNBALANCED_CODE_FENCE: {
        "closed": ask("Show a loop.", "```\nwhile True: pass\n```"),
        "fence in a longer fence": ask("Show Markdown.", "````\n```\n````"),
        "opened by the prompt": ask("Complete:\n```python\ndef f():", "    return 1\n```"),
        "ticks in a line": ask("How is a fence written?", "With ``` at the start of a line"),
    },
    Reason.BABBLE: {
        "refrain on request": ask("Write a song.", "La la la, sing with me. " * 20),
        "laughter": ask("Say something.", "ha " * 200),
        "numbers": ask("Show zeros.", "0 0 0 0 " * 60),
        "table": ask("Show the grid.", "| yes | no |\n" * 40),
        "survey scale": ask(
            "Ask about it.", "".join(f"How good was part {i}? Bad, fair, good, very good.\n" for i in range(20))
        ),
        "poem with a refrain": ask("Write verses.", "".join(f"{i} birds fly.\nAnd home we go.\n" for i in range(20))),
    },
    Reason.URL_ONLY: {
        "link on request": ask("Give me the link to the manual.", "https://example.com/manual"),
        "where": ask("Where can I download it?", "https://example.com"),
        "in a sentence": ask("How do I reset it?", "See https://example.com/reset"),
    },
    Reason.MISSING_IMAGE: {
        "images in general": ask("How do I crop an image?", "Open the image and choose Crop."),
        "Markdown on request": ask("Embed a.png in Markdown.", "![a](a.png)"),
        "description given": ask("Alt text for the image below? Description: a dog runs.", "A running dog"),
        "furniture": ask("What hung there?", "A mirror replaced the picture above the fireplace."),
        "code": ask("How is it shown?", "Write `![name](file)`."),
    },
    Reason.PROMPT_LEAKS_ANSWER: {
        "extraction": ask(
            "Extract the rule: Hold the small button for ten seconds or more. Then wait.",
            "Hold the small button for ten seconds or more.",
        ),
        "short": ask("Is it red or dark blue? It is dark blue in daylight.", "It is dark blue"),
        "correction": ask(
            "Correct it: He goes home at ten with both of his dogs.", "He goes home at ten with both of his dogs."
        ),
        "choice": ask(
            "Which is true? The sun turns around the earth all day. The earth turns around the sun all year.",
            "The earth turns around the sun all year.",
        ),
    },
    Reason.MARKUP: {
        "HTML on request": ask("Write a line break in HTML.", "<br>"),
        "code block": ask("Show it.", "```\n<div>a</div>\n```"),
        "inline code": ask("How?", "Use `<br>` there."),
        "mathematics": ask("When is it true?", "If a < b and c > d & e."),
        "generics": ask("Which type?", "List<String> of names"),
    },
    Reason.WRONG_LANGUAGE: {
        "translation": ask("Translate to German: the dog sleeps under the table because of the heat.", GERMAN),
        "a named language": ask("Write two sentences in Chinese.", CHINESE),
        "short": ask("What is on the sign?", "Eingang"),
        "dishes": ask("Name dishes of Italy.", "- Ragù alla Bolognese\n- Risotto\n- Pizza Napoletana\n- Ossobuco"),
        "code": ask("Show it.", "```\nfür_alle = [eins, zwei, drei, vier, fünf, sechs, sieben]\n```"),
    },
    Reason.MIXED_LANGUAGE: {
        "a name": ask("Who wrote it?", f"It was 鲁迅 who wrote it. {PROSE}."),
        "translation": ask("Explain and translate to Chinese.", f"{PROSE}. {CHINESE}"),
        "one Russian word": ask("Who?", f"The probe was named Спутник at the time. {PROSE}."),
    },
    Reason.CUSTOM: {
        "no price": ask("How much?", "Five dollars."),
        "price in the question": ask("Is $5 enough?", "Yes."),
        "nearly too long": ask("a " * 2400, "b"),
    },
}

CASES_CAUGHT = [(reason, name) for reason, cases in CAUGHT.items() for name in cases]
CASES_KEPT = [(reason, name) for reason, cases in KEPT.items() for name in cases]


def found(checked: RowCheck) -> set[Reason]:
    return {hit.reason for hit in (checked.rejection, *checked.flags) if hit}


def check(bad: Row, spec: RulesSpec = SPEC) -> RowCheck:
    return check_row(bad, spec, LIMIT)


def spec_for(reason: Reason) -> RulesSpec:
    """Languages are judged only where the case is about them: other cases may be in any."""
    if reason in {Reason.WRONG_LANGUAGE, Reason.MIXED_LANGUAGE}:
        return SPEC
    return SPEC.model_copy(update={"languages": []})


def test_every_rule_has_three_cases_and_three_traps() -> None:
    shapes = {Reason.NO_FINAL_ANSWER, Reason.WRONG_ROLE_ORDER, Reason.EMPTY_PROMPT, Reason.EMPTY_ANSWER}
    assert set(CAUGHT) == set(KEPT) == shapes | {reason for reason, _ in RULES}
    assert all(len(cases) >= 3 for table in (CAUGHT, KEPT) for cases in table.values())


@pytest.mark.parametrize(("reason", "name"), CASES_CAUGHT)
def test_a_bad_row_is_caught_for_its_reason(reason: Reason, name: str) -> None:
    checked = check(CAUGHT[reason][name], spec_for(reason))
    if reason in FLAGGED:
        assert reason in {flag.reason for flag in checked.flags}
        assert checked.rejection is None
    else:
        assert checked.rejection is not None
        assert checked.rejection.reason == reason


@pytest.mark.parametrize(("reason", "name"), CASES_KEPT)
def test_a_trap_raises_nothing(reason: Reason, name: str) -> None:
    assert check(KEPT[reason][name], spec_for(reason)) == RowCheck(None, ())


def test_a_row_with_two_faults_has_the_first_one_as_its_reason_and_the_flags_before_it() -> None:
    both = ask("Describe your house.", "As an AI, I don't have a house. It costs $5.")
    checked = check(both)
    assert [flag.reason for flag in checked.flags] == [Reason.REFUSAL]
    assert checked.rejection is not None
    assert checked.rejection.reason == Reason.CUSTOM


@pytest.mark.parametrize("reason", [Reason.URL_ONLY, Reason.REFUSAL, Reason.TOO_LONG, Reason.CUSTOM])
def test_an_action_replaces_the_default(reason: Reason) -> None:
    bad = next(iter(CAUGHT[reason].values()))
    results = {
        action: check(bad, RulesSpec(actions={reason: action}, custom=SPEC.custom[:1]))
        for action in ("quarantine", "flag", "off")
    }
    assert results["quarantine"].rejection is not None
    assert results["quarantine"].rejection.reason == reason
    assert results["flag"].rejection is None
    assert [flag.reason for flag in results["flag"].flags] == [reason]
    assert found(results["off"]) == set()


def test_a_flag_does_not_hide_a_later_fault() -> None:
    bad = ask("How do I reset it?", "https://example.com/$5")
    checked = check(bad, RulesSpec(actions={Reason.URL_ONLY: "flag"}, custom=SPEC.custom))
    assert found(checked) == {Reason.URL_ONLY, Reason.CUSTOM}


def test_an_overruled_reason_is_off_for_this_row_and_other_reasons_still_hold() -> None:
    bad = ask("How do I reset it?", "https://example.com/$5")
    assert found(check_row(bad, SPEC, LIMIT, frozenset({Reason.URL_ONLY}))) == {Reason.CUSTOM}
    assert found(check_row(bad, SPEC, LIMIT, frozenset({Reason.URL_ONLY, Reason.CUSTOM}))) == set()


@pytest.mark.parametrize("reason", [Reason.EMPTY_ANSWER, Reason.NO_FINAL_ANSWER, Reason.TEMPLATE_TOKEN])
def test_an_unreadable_row_cannot_be_overruled(reason: Reason) -> None:
    bad = next(iter(CAUGHT[reason].values()))
    assert found(check_row(bad, RulesSpec(), LIMIT, frozenset({reason}))) == {reason}


def test_languages_are_not_judged_unless_some_are_named() -> None:
    assert check(ask("Where is the dog?", GERMAN), RulesSpec()) == RowCheck(None, ())


@pytest.mark.parametrize("name", CAUGHT[Reason.WRONG_LANGUAGE])
def test_an_allowed_language_is_kept(name: str) -> None:
    either = RulesSpec(languages=["de", "zh", "en"])
    assert check(CAUGHT[Reason.WRONG_LANGUAGE][name], either) == RowCheck(None, ())


def test_chinese_terms_without_a_sentence_are_not_taken_for_another_language() -> None:
    for terms in (
        "负压吸引不当\uff1b胃管在胃内打结\uff1b胃管堵塞\uff1b减压管不通畅",
        "病灶清除加闭式灌洗术\uff1b灌洗术式\uff1b闭式灌洗术",
    ):
        assert check(ask("有哪些\uff1f", terms), RulesSpec(languages=["zh"])) == RowCheck(None, ())


LIMITS = {
    "forbidden": (CustomRule(name="mine", forbidden="cat"), "a cat", "a dog", "mine: forbidden pattern found"),
    "required": (CustomRule(name="mine", required="cat"), "a dog", "a cat", "mine: required pattern missing"),
    "allowed": (CustomRule(name="mine", allowed=["yes", "no"]), "maybe", "yes\n", "mine: not one of 2 allowed values"),
    "min_chars": (CustomRule(name="mine", min_chars=3), "ab", "abc", "mine: 2 characters, at least 3"),
    "max_chars": (CustomRule(name="mine", max_chars=3), "abcd", "abc", "mine: 4 characters, limit 3"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_rule_of_the_users_names_itself_and_its_limit(limit: str) -> None:
    rule, bad, good, detail = LIMITS[limit]
    rejection = check(ask("Q?", bad), RulesSpec(custom=[rule])).rejection
    assert rejection is not None
    assert (rejection.reason, rejection.detail) == (Reason.CUSTOM, detail)
    assert check(ask("Q?", good), RulesSpec(custom=[rule])).rejection is None


@pytest.mark.parametrize(
    ("field", "hits"), [("prompt", [True, False]), ("completion", [False, True]), ("any", [True, True])]
)
def test_a_rule_of_the_users_reads_only_its_field(field: str, hits: list[bool]) -> None:
    spec = RulesSpec.model_validate({"custom": [{"name": "mine", "field": field, "forbidden": "cat"}]})
    rows = [ask("A cat?", "No."), ask("A dog?", "A cat.")]
    assert [bool(check(each, spec).rejection) for each in rows] == hits


def test_the_users_function_rejects_with_its_own_words_cut_to_80_characters() -> None:
    spec = RulesSpec(function="my_rules.py:judge")
    seen: list[tuple[str, str]] = []

    def judge(prompt: str, completion: str) -> str | None:
        seen.append((prompt, completion))
        return "x" * 200 if "bad" in completion else None

    assert check_row(ask("Q?", "good"), spec, LIMIT, own=judge) == RowCheck(None, ())
    rejection = check_row(ask("Q?", "bad"), spec, LIMIT, own=judge).rejection
    assert rejection is not None
    assert rejection.detail == "judge: " + "x" * 80
    assert seen == [("Q?", "good"), ("Q?", "bad")]


def test_what_the_users_function_raises_is_not_swallowed_but_a_rule_that_is_off_is_not_called() -> None:
    def broken(prompt: str, completion: str) -> str | None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        check_row(ask("Q?", "a"), RulesSpec(), LIMIT, own=broken)
    off = RulesSpec(actions={Reason.CUSTOM: "off"})
    assert check_row(ask("Q?", "a"), off, LIMIT, own=broken) == RowCheck(None, ())


@pytest.mark.parametrize(("reason", "name"), CASES_CAUGHT)
def test_a_detail_never_quotes_the_row(reason: Reason, name: str) -> None:
    """No run of 12 characters of the row stands in the detail; a fixed token that was found may be named."""
    bad = CAUGHT[reason][name]
    checked = check(bad, spec_for(reason))
    details = [hit.detail for hit in (checked.rejection, *checked.flags) if hit]
    text = "\n".join(message.content for message in bad.messages)
    quotes = [detail[at : at + 12] for detail in details for at in range(len(detail) - 11)]
    assert all(details)
    if reason != Reason.TEMPLATE_TOKEN:
        assert [quote for quote in quotes if quote in text] == []


def test_a_length_is_told_with_its_limit() -> None:
    rejection = check_row(ask("a" * 10, "b" * 63), RulesSpec(), 10).rejection
    assert rejection is not None
    assert rejection.detail == "73 characters, limit 10"
