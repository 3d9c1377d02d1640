"""Personal data and secrets are found by format and checksum, so that a date or a version is not taken for one.

Example: find("mail a.lovelace@math.org") finds one EMAIL; mask(text, find(text)) == "mail [EMAIL]"
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Final, NamedTuple

import phonenumbers
import stdnum.cn.ric
import stdnum.gb.nhs
import stdnum.iban
import stdnum.luhn
import stdnum.us.ssn


class PersonalDataKind(StrEnum):
    """What was found; the value is the word in the mask."""

    SECRET = "SECRET"
    EMAIL = "EMAIL"
    IBAN = "IBAN"
    CARD = "CARD"
    NATIONAL_ID = "NATIONAL_ID"
    IP = "IP"
    PHONE = "PHONE"


class Finding(NamedTuple):
    kind: PersonalDataKind
    start: int
    end: int
    secret: bool


Span = tuple[int, int]

# Literals that a secret can only start with: one of them must be there before any pattern is tried.
_KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:A(?:KIA|SIA)[A-Z0-9]{16}(?![A-Z0-9])|gh[opsur]_[A-Za-z0-9]{36,255}|github_pat_\w{50,255}"
    r"|xox[abeprs]-[A-Za-z0-9-]{16,255}|AIza[A-Za-z0-9_-]{35}|sk-[A-Za-z0-9_-]{20,255}|hf_[A-Za-z0-9]{30,64}"
    r"|[rs]k_live_[A-Za-z0-9]{16,255})"
)
_KEY_STARTS = ("AKIA", "ASIA", "ghp_", "gho_", "ghs_", "ghu_", "ghr_", "github_", "xox", "AIza", "sk-", "hf_", "_live_")
_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{8,2000}\.eyJ[\w-]{8,8000}\.[\w-]{8,2000}")
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----[A-Za-z0-9+/=\s:,\\-]{40,20000}?"
    r"-----END (?:[A-Z0-9]{1,12} ){0,2}PRIVATE KEY(?: BLOCK)?-----"
)
_ASSIGNED = re.compile(
    r"(?i)(?:passw(?:or)?d|pwd|api_?-?key|secret(?:_?-?key)?|token|access_?-?key)[\"']?\s{0,3}(?:=|:|=>)\s{0,3}"
    r"(?P<quote>[\"'])(?P<value>[^\"'\s]{16,256})(?P=quote)"
)
_PLACEHOLDER = re.compile(
    r"(?i)x{4}|example|your|placeholder|dummy|changeme|redacted|sample|1234567|abcdef|p[a@]ssw[o0]rd|\*{3}|\.{3}"
    r"|(.)\1{4}|^[<\[{$%(]|[(){}<>\[\]]|://"
)
# The token of every JWT tutorial: {"sub": "1234567890"}.
_JWT_OF_TUTORIALS = "eyJzdWIiOiIxMjM0NTY3ODkw"

_EMAIL = re.compile(
    r"(?<![\w.%+/=-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}"
    r"[A-Za-z]{2,18}(?![\w-]|\.?\()"
)
_NO_ADDRESS = re.compile(
    r"(?i)@(?:.+\.)?(?:(?:my|your|some|the|a)?-?(?:example[\w-]*|domain|company|companyname|business|website"
    r"|site|server|host|hostname|provider|e?mail|test|sample|xyz|abc|acme|foo|bar)\.[a-z.]+|example|test|invalid"
    r"|localhost|local|internal|lan)$"
    r"|@[\w.-]+\.(?:png|jpe?g|gif|svg|webp|js|ts|py|css|json|html|md|txt|yaml|so|exe)$|@(?:self|this|np|torch)\."
    r"|^(?:user(?:name|\d+)?|your[._-]?\w*|my[._-]?e?mail|e?mail|name|first\w*last\w*|some(?:one|body)|example|test\w*"
    r"|foo|bar|abc\w*|xyz|sample|johnd?|(?:john|jane)[._-]?(?:doe|smith)\d*|recipient|git)@"
    # an office is no person
    r"|^(?:info|support|help|contact|contactus|admin|sales|service|office|press|hello|webmaster|postmaster|no-?reply"
    r"|do-?not-?reply|feedback|[ei]nquir\w+|privacy|alerts?|news(?:letter)?|security|abuse|jobs|hr|billing)@"
)

_MANY_DIGITS = re.compile(r"[0-9](?:[ ().+/-]{0,3}[0-9]){5}")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_IBANS_OF_TUTORIALS = frozenset(
    {"GB82WEST12345698765432", "GB29NWBK60161331926819", "GB33BUKB20201555555555", "DE89370400440532013000",
     "DE91100000000123456789", "FR1420041010050500013M02606", "FR7630006000011234567890189", "NL91ABNA0417164300",
     "ES9121000418450200051332", "CH9300762011623852957", "BE68539007547034", "IT60X0542811101000000123456"}
)  # fmt: skip
_CARD = re.compile(
    r"(?a)(?<![\w.,/-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{5})(?![\w/-]|[.,]\d)"
)
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})$|5[1-5]\d{14}$|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}$|3[47]\d{13}$"
    r"|(?:6011|65\d\d|64[4-9]\d)\d{12}$|35(?:2[89]|[3-8]\d)\d{12}$|62\d{14,17}$|3(?:0[0-5]|[68]\d)\d{11}$"
)
_TEST_CARDS = frozenset(
    {"4012888888881881", "4000056655665556", "378282246310005", "371449635398431", "6011000990139424",
     "5105105105105100", "2223003122003222", "30569309025904", "38520000023237", "3530111333300000", "3566002020360505",
     "5200828282828210", "4532015112830366", "6200000000000005", "5425233430109903", "4917610000000000"}
)  # fmt: skip
_SSN = re.compile(r"(?<![\w.-])[0-9]{3}([ -])[0-9]{2}\1[0-9]{4}(?![\w-]|\.[0-9])")
_CN_RIC = re.compile(r"(?<![A-Za-z0-9.])[1-9][0-9]{16}[0-9Xx](?![A-Za-z0-9])")
_NINO = re.compile(
    r"(?<!\w)(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z]( ?)(?:[0-9]{2}\1){3}[A-D](?!\w)"
)
_NHS = re.compile(r"(?<![\w.-])[0-9]{3}([ -]?)[0-9]{3}\1[0-9]{4}(?![\w-]|\.[0-9])")

_IP4 = re.compile(r"(?<![\w.-])(?<![^/]/)(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w/-]|\.[0-9])(?!:[0-9]+\.)")
_IP6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:])")
_PUBLIC_SERVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "1.2.3.4", "208.67.222.222"})

_PHONE = re.compile(r"(?<![\w.,/=-])(?:\+ ?|\()?[0-9](?:[ ().-]{0,3}[0-9]){6,14}(?![\w/-]|[.,][0-9])")
_DATE = re.compile(
    r"(?:19|20)\d\d[-./ ]\d\d?[-./ ]\d\d?|\d\d?[-./ ]\d\d?[-./ ](?:19|20)\d\d|(?:19|20)\d\d ?- ?(?:19|20)\d\d"
)
_REGIONS = ("US", "GB", "CN")
# A hotline belongs to nobody, so only the numbers of a person or a household count.
_Type = phonenumbers.PhoneNumberType
_PERSONS = frozenset({_Type.MOBILE, _Type.FIXED_LINE, _Type.FIXED_LINE_OR_MOBILE, _Type.PERSONAL_NUMBER})
# 555 in North America, Ofcom's numbers for drama, and runs that nobody was given.
_FICTION = re.compile(
    r"^1\d{3}555|^1555|^44(?:1632960|2079460|7700900|1134960|1144960|1614960)|1234567|7654321|(\d)\1{5}|^8613800138"
)

_SAYS_PHONE = re.compile(
    r"(?i)\b(?:phone|telephone|tel|call|mobile|cell|fax|whatsapp|setting|contact|text|reach)\b|电话|手机|致电|拨打|联系方式|传真"
)
_SAYS_OTHER = re.compile(
    r"(?i)\b(?:isbn|issn|order|invoice|tracking|serial|item|sku|product|doi|pmid|ticket|model|ref\w*)\b"
    r"|订单|编号|单号|型号|批准文号"
)
_SAYS_SSN = re.compile(r"(?i)\bssns?\b|social security")
_SAYS_NINO = re.compile(r"(?i)\bni(?:no)?\b|national insurance")
_SAYS_IP = re.compile(r"(?i)\b(?:ip|ipv4|server|host|address|ping|ssh|client|dns)\b|服务器|地址")
_SAYS_VERSION = re.compile(r"(?i)(?:\b(?:versions?|ver|v|release|build|section|chapter|rev)\b|版本)[^A-Za-z]{0,6}$")


def _before(text: str, start: int, length: int = 40) -> str:
    """What leads to a find; never across a bracket, so that it reads the same after masking."""
    return re.split(r"[\[\]]", text[max(0, start - length) : start])[-1]


def _entropy(value: str) -> float:
    """Bits per character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values())


def _is_random(value: str) -> bool:
    """No placeholder, with letters and digits, and about as mixed as a generated key."""
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return mixed and not _PLACEHOLDER.search(value) and _entropy(value) >= 3.0


def _secrets(text: str) -> Iterator[Span]:
    if "-----BEGIN " in text:
        yield from (m.span() for m in _PRIVATE_KEY.finditer(text) if not _PLACEHOLDER.search(m[0][30:-30].strip("-")))
    if any(start in text for start in _KEY_STARTS):
        yield from (m.span() for m in _KEY.finditer(text) if _is_random(m[0]))
    if "eyJ" in text:
        yield from (m.span() for m in _JWT.finditer(text) if _JWT_OF_TUTORIALS not in m[0])
    if '"' in text or "'" in text:
        yield from (m.span("value") for m in _ASSIGNED.finditer(text) if _is_password(m["value"]))


def _is_password(value: str) -> bool:
    """A generated value: three kinds of characters, and no word with a year behind it."""
    kinds = (str.islower, str.isupper, str.isdigit, lambda c: not c.isalnum())
    long_hex = len(value) >= 24 and re.fullmatch(r"[0-9a-f]+", value) is not None
    return _is_random(value) and (long_hex or sum(any(map(kind, value)) for kind in kinds) >= 3)


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (m.span() for m in _EMAIL.finditer(text) if not _NO_ADDRESS.search(m[0]))


def _ibans(text: str) -> Iterator[Span]:
    for match in _IBAN.finditer(text):
        words = match[0].split(" ")
        # Capitals that follow may look like one more group: it is dropped until the checksum fits.
        for n in range(len(words), 0, -1):
            number = "".join(words[:n])
            if stdnum.iban.is_valid(number):
                if number not in _IBANS_OF_TUTORIALS:
                    yield match.start(), match.start() + len(" ".join(words[:n]))
                break


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        invented = digits in _TEST_CARDS or len(set(digits)) <= 3 or "000000" in digits or "1234567" in digits
        if invented or not _ISSUER.match(digits) or not stdnum.luhn.is_valid(digits):
            continue
        if not _SAYS_OTHER.search(_before(text, match.start())):
            yield match.span()


def _national_ids(text: str) -> Iterator[Span]:
    for match in _SSN.finditer(text):
        clear = match[1] == "-" or _SAYS_SSN.search(_before(text, match.start()))
        number = match[0].replace(" ", "-")
        if clear and number not in {"123-45-6789", "987-65-4321"} and stdnum.us.ssn.is_valid(number):
            yield match.span()
    yield from (m.span() for m in _CN_RIC.finditer(text) if stdnum.cn.ric.is_valid(m[0]) and "1234567" not in m[0])
    nhs = (m for m in _NHS.finditer(text) if stdnum.gb.nhs.is_valid(m[0]))
    yield from (m.span() for m in nhs if "NHS" in _before(text, m.start()))
    ninos = (m for m in _NINO.finditer(text) if "123456" not in m[0].replace(" ", ""))
    yield from (m.span() for m in ninos if _SAYS_NINO.search(_before(text, m.start())))


def _ips(text: str) -> Iterator[Span]:
    for match in (*_IP4.finditer(text), *_IP6.finditer(text)):
        before = _before(text, match.start(), 20)
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        # 4.1.2.3 alone is more often a section or a version
        small = address.version == 4 and sum(len(part) > 1 for part in match[0].split(".")) < 2
        somebodys = address.is_global and not address.is_multicast and match[0] not in _PUBLIC_SERVERS
        if somebodys and not _SAYS_VERSION.search(before) and (not small or _SAYS_IP.search(before)):
            yield match.span()


def _is_persons_number(number: phonenumbers.PhoneNumber) -> bool:
    digits = f"{number.country_code}{number.national_number}"
    return phonenumbers.number_type(number) in _PERSONS and not _FICTION.search(digits)


def _phones(text: str) -> Iterator[Span]:
    for match in _PHONE.finditer(text):
        before = _before(text, match.start())
        international = match[0].startswith("+")
        if _DATE.search(match[0]) or _SAYS_OTHER.search(before) or not (international or _SAYS_PHONE.search(before)):
            continue
        for region in (None,) if international else _REGIONS:
            hits = list(phonenumbers.PhoneNumberMatcher(match[0], region))
            yield from ((match.start() + m.start, match.start() + m.end) for m in hits if _is_persons_number(m.number))
            # a hotline of one country could be a household's number in the next
            if hits:
                break


# In this order: where two overlap, the surer one wins.
_Searches = tuple[tuple[PersonalDataKind, Callable[[str], Iterator[Span]]], ...]
_WITHOUT_NUMBERS: Final[_Searches] = (
    (PersonalDataKind.SECRET, _secrets),
    (PersonalDataKind.EMAIL, _emails),
    (PersonalDataKind.IP, _ips),
)
_ALL: Final[_Searches] = (
    *_WITHOUT_NUMBERS,
    (PersonalDataKind.IBAN, _ibans),
    (PersonalDataKind.CARD, _cards),
    (PersonalDataKind.NATIONAL_ID, _national_ids),
    (PersonalDataKind.PHONE, _phones),
)


def _scan(text: str) -> list[Finding]:
    """One pass: the finds, none of which overlap."""
    found: list[Finding] = []
    for kind, search in _ALL if _MANY_DIGITS.search(text) else _WITHOUT_NUMBERS:
        for start, end in search(text):
            if all(end <= other.start or start >= other.end for other in found):
                found.append(Finding(kind, start, end, secret=kind is PersonalDataKind.SECRET))
    return found


def find_personal_data(text: str) -> list[Finding]:
    """Every find in the order of the text; none overlap, and nothing is left to find once they are masked."""
    if "@" not in text and not any(digit in text for digit in "0123456789") and "-----BEGIN " not in text:
        return []
    found: list[Finding] = []
    # A find can hide what stands next to it, so the text is searched again with the finds blanked.
    while new := _scan(text):
        found += new
        for one in new:
            text = f"{text[: one.start]}[{'E' * (one.end - one.start - 2)}]{text[one.end :]}"
    return sorted(found, key=lambda one: one.start)


def mask(text: str, found: Sequence[Finding]) -> str:
    """The text with the name of its kind in place of each find."""
    for one in sorted(found, key=lambda one: one.start, reverse=True):
        text = f"{text[: one.start]}[{one.kind.value}]{text[one.end :]}"
    return text


_ABOUT = re.compile(
    r"(?i)\b(?:redact\w*|anonymi[sz]\w*|pseudonymi[sz]\w*|de-?identif\w*|PII|personally identifiable)\b"
    r"|\b(?:(?:mask|remove|hide|censor|scrub|strip|replace|extract|parse|validat\w+)\b[^.?!\n]{0,80}\b"
    r"|(?:find|identify|list|pull|get|detect|match\w*|recogni[sz]\w+|highlight) (?:(?:all|the|every|any|of) ){0,3})"
    r"(?:e-?mails?|(?:tele)?phones?|contact (?:details|info\w*)|(?:credit|bank) cards?|card num\w+|social security"
    r"|SSNs?|IBANs?|IP address\w*|(?:personal|sensitive) (?:data|info\w*|details)|passwords?|secrets?|credentials)\b"
    r"|(?:数据|信息|文本|隐私)[^。\n]{0,6}脱敏|脱敏处理|匿名化|去标识"
    r"|(?:提取|抽取|识别|找出|隐藏|删除|遮盖|验证)[^。\n]{0,30}(?:邮箱|邮件地址|电话|手机号|身份证|联系方式|个人信息|银行卡|敏感信息)"
)


def is_about_personal_data(prompt: str) -> bool:
    """Whether the task is to redact, extract or check such data: its row needs them, so they stay."""
    return _ABOUT.search(prompt) is not None
