"""The verdict next to the change: one comment on a pull or merge request, which later runs edit.

Sends only with `--comment`, only to the API that the CI job names, and never decides: what goes wrong is a warning.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from pydantic import BaseModel, TypeAdapter
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from data_contracts.errors import Problem
from data_contracts.verdict import Decision
from flows.cli.output import show_problems
from flows.cli.pages.gate_report import markdown

_MOST_CHARACTERS = 65_000  # GitHub takes 65,536
_PAGE = 100  # the most that both platforms list at once
_SECONDS = 20.0
# A POST that was answered with 5xx may have been carried out: the next run edits both comments, so none goes stale.
_RETRY = Retry(
    total=3,
    allowed_methods=["GET", "POST", "PATCH", "PUT"],
    status_forcelist=[429, 500, 502, 503, 504],
    backoff_factor=0.5,
    retry_after_max=30,
    raise_on_status=False,
)
_NEEDED = (
    "GITHUB_TOKEN, GITHUB_REPOSITORY and the GITHUB_EVENT_PATH of a pull request; "
    "or TUNEGATE_GITLAB_TOKEN, CI_API_V4_URL, CI_PROJECT_ID and CI_MERGE_REQUEST_IID"
)


@dataclass(frozen=True)
class Thread:
    """The comments of one request: `comments` lists and takes new ones, `comment`/ID is one, `edit` the method for it."""

    token: str
    comments: str
    comment: str
    edit: str
    commit: str


class _Comment(BaseModel):
    id: int
    body: str | None = None


_LISTED = TypeAdapter(list[_Comment])


class _Bearer(requests.auth.AuthBase):
    """Unlike a header of the session it is not overruled by ~/.netrc. Both platforms take it."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


def put_comment(decision: Decision) -> None:
    """Edit the model's comment, or make it. Only warns, with words that never hold the token."""
    thread = find_thread(os.environ)
    if thread is None:
        show_problems("warning", [Problem("there is no pull request to comment on", "--comment", _NEEDED)])
        return
    try:
        _put(thread, body(decision, thread.commit), marker(decision.name))
    except (requests.RequestException, ValueError) as error:
        refused = _status(error) in (401, 403, 404)
        act = "let the token write comments; for a pull request from a fork it can only read" if refused else ""
        show_problems("warning", [Problem(f"the comment was not written: {_reason(error)}", "--comment", act=act)])


def find_thread(environment: Mapping[str, str]) -> Thread | None:
    """The request that this CI job is for, from the variables that GitHub or GitLab sets for a job; None if it is for none."""
    given = {name: value.strip() for name, value in environment.items()}
    return _github(given) or _gitlab(given)


def body(decision: Decision, commit: str) -> str:
    """The comment: a marker to find it by, the Markdown (without its details where it is too long), the commit."""
    footer = f"\n<sub>commit {re.sub('[^0-9a-f]', '', commit)[:12]}</sub>\n" if commit else ""
    found = [f"{marker(decision.name)}\n{markdown(decision, details)}{footer}" for details in (True, False)]
    return next((text for text in found if len(text) <= _MOST_CHARACTERS), found[1][:_MOST_CHARACTERS])


def marker(name: str) -> str:
    """An HTML comment that no reader sees; each model has its own."""
    return f"<!-- tunegate gate {re.sub('[^A-Za-z0-9._-]', '_', name).replace('--', '__')} -->"


def _put(thread: Thread, text: str, mark: str) -> None:
    with requests.Session() as session:
        session.auth = _Bearer(thread.token)
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=_RETRY))
        mine = [found for found in _comments(session, thread) if (found.body or "").startswith(mark)]
        for found in mine:
            _ask(session, thread.edit, f"{thread.comment}/{found.id}", json={"body": text})
        if not mine:
            _ask(session, "POST", thread.comments, json={"body": text})


def _comments(session: requests.Session, thread: Thread) -> Iterator[_Comment]:
    page, count = 1, _PAGE
    while count == _PAGE:
        answer = _ask(session, "GET", thread.comments, params={"per_page": _PAGE, "page": page})
        found = _LISTED.validate_json(answer)
        yield from found
        page, count = page + 1, len(found)


def _ask(session: requests.Session, method: str, url: str, **what: Any) -> bytes:
    response = session.request(method, url, timeout=_SECONDS, **what)
    response.raise_for_status()
    return response.content


def _github(given: Mapping[str, str]) -> Thread | None:
    token, repository, event_file = (given.get(n) for n in ("GITHUB_TOKEN", "GITHUB_REPOSITORY", "GITHUB_EVENT_PATH"))
    if not (token and repository and event_file):
        return None
    try:
        request = json.loads(Path(event_file).read_text(encoding="utf-8"))["pull_request"]
        number, commit = int(request["number"]), str(request["head"]["sha"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another event, such as a push
    issues = f"{given.get('GITHUB_API_URL') or 'https://api.github.com'}/repos/{repository}/issues"
    return Thread(token, f"{issues}/{number}/comments", f"{issues}/comments", "PATCH", commit)


def _gitlab(given: Mapping[str, str]) -> Thread | None:
    names = ("TUNEGATE_GITLAB_TOKEN", "CI_API_V4_URL", "CI_PROJECT_ID", "CI_MERGE_REQUEST_IID")
    token, api, project, number = (given.get(name) for name in names)
    if not (token and api and project and number):
        return None
    notes = f"{api}/projects/{project}/merge_requests/{number}/notes"
    return Thread(token, notes, notes, "PUT", given.get("CI_COMMIT_SHA", ""))


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def _reason(error: Exception) -> str:
    """The kind of failure and what the platform says; not the exception's own text, which may hold what was sent."""
    response = getattr(error, "response", None)
    if response is None:
        return type(error).__name__
    try:
        said = " ".join(str(response.json().get("message", "")).split())[:200]
    except (ValueError, AttributeError):
        said = ""
    return f"{response.status_code} {response.reason}{': ' + said if said else ''}"
