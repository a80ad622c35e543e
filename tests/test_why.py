"""`why FILE:LINE`: from a line to its commit, the agent who made it and the conversation (sections 11 and 26)."""

import json
import os
import subprocess

import pytest

import thrum
from conftest import CLEAN
from shapes import shaped
from team import POISON, Team, error_line, raw_in

pytestmark = pytest.mark.slow

AUTHOR = {"GIT_AUTHOR_NAME": "Jürgen Doe", "GIT_AUTHOR_EMAIL": "j@localhost", "GIT_AUTHOR_DATE": "2026-03-10T23:30:00-05:00",
          "GIT_COMMITTER_NAME": "Test", "GIT_COMMITTER_EMAIL": "t@localhost"}


def commit(repo, message, **environ):
    subprocess.run(["git", "commit", "-qaF", "-"], cwd=repo.path, env={**CLEAN, **AUTHOR, **environ}, input=message.encode(), check=True,
                   capture_output=True)
    return repo.git("rev-parse", "HEAD").strip()


def add(repo, name, text):
    path = repo.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    repo.git("--literal-pathspecs", "add", "--", name)


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("why") / "team")
    made.ada.ok("guard", "install")
    yield made
    made.close()


@pytest.fixture(scope="module")
def talk(team):
    """A file of @bob's: a line of before, one from a conversation, one that is not committed.  Thread and commit."""
    bob = team.bob
    add(bob, "src/main.c", "old\n")
    commit(bob, "Before\n")
    thread = bob.json("reply", team.mail("How shall it go?"), "In two passes.")["thread_id"]
    add(bob, "src/main.c", "old\nnew\n")
    sha = commit(bob, "Two passes\n\nThe second one is faster.\n")
    (bob.path / "src/main.c").write_text("old\nnew\nmore\n")
    return thread, sha


def test_a_line_leads_to_its_conversation(team, talk):
    thread, sha = talk
    report = team.bob.json("why", "src/main.c:2")
    shaped(report, "Why")
    assert {key: value for key, value in report.items() if key != "messages"} == {
        "file": "src/main.c", "line": 2, "agent_id": "bob", "thread_id": thread, "total": 2, "commit": {
            "sha": sha, "author": "Jürgen Doe", "date": report["commit"]["date"],
            "message": f"Two passes\n\nThe second one is faster.\n\nThrum-Thread: {thread}\nThrum-Agent: bob"}}
    assert thrum.ns_of(report["commit"]["date"]) == thrum.ns_of("2026-03-11T04:30:00Z")
    assert [message["body"]["content"] for message in report["messages"]] == ["How shall it go?", "In two passes."]
    lines = team.bob.ok("why", "src/main.c:2").splitlines()
    assert lines[:5] == ["src/main.c:2: new", f"Commit:  {sha[:7]}  Two passes", "         2026-03-11 04:30 by Jürgen Doe",
                         "Agent:   @bob", f"Thread:  {thread}"]
    assert "How shall it go?" in lines[7] and "In two passes." in lines[10] and len(lines) == 11


def test_from_where_it_is_called(team, talk):
    for cwd, name in ((team.bob.path / "src", "main.c"), (team.bob.path / "src", "./../src//main.c"), (team.folder, None)):
        name = name or str(team.bob.path / "src" / "main.c")
        args = ("--repo", str(team.bob.path)) if cwd == team.folder else ()
        assert team.bob.json("why", name + ":2", *args, cwd=cwd)["thread_id"] == talk[0]
    link = team.folder / "link"
    link.symlink_to(team.bob.path / "src")
    assert team.bob.json("why", f"{link}/main.c:2")["thread_id"] == talk[0]


def test_a_line_without_a_conversation(team, talk):
    assert "names no conversation" in team.bob.ok("why", "src/main.c:1")
    report = team.bob.json("why", "src/main.c:1")
    assert report["messages"] == [] and "thread_id" not in report
    assert report["agent_id"] == "bob", "whose unmerged work it is"
    assert "not committed yet" in team.bob.ok("why", "src/main.c:3")
    assert team.bob.json("why", "src/main.c:3") == {"file": "src/main.c", "line": 3, "commit": None}


def test_a_conversation_that_is_not_here(team):
    add(team.ada, "far", "x\n")
    commit(team.ada, "From afar\n\nThrum-Thread: thr_ELSEWHERE\nThrum-Agent: zoe\n")
    text = team.ada.ok("why", "far:1")
    assert "@zoe" in text and "thr_ELSEWHERE" in text and "not known here" in text


def test_a_long_conversation_shows_its_end(team):
    first = team.mail("0")
    for n in range(1, 13):
        thread = team.bob.json("reply", first, str(n))["thread_id"]
    add(team.bob, "long", "x\n")
    commit(team.bob, "Long\n")
    report = team.bob.json("why", "long:1")
    assert [m["body"]["content"] for m in report["messages"]] == [str(n) for n in range(3, 13)]
    assert (report["total"], report["thread_id"]) == (13, thread)
    assert "3 earlier messages left out; --limit N" in team.bob.ok("why", "long:1")
    assert "1 earlier message left" in team.bob.ok("why", "long:1", "--limit", "12")
    assert "left out" not in team.bob.ok("why", "long:1", "--limit", "1000")


def test_reading_why_leaves_mail_unread(team):
    asked = team.mail("Unread?")
    thread = team.bob.json("reply", asked, "Yes.")["thread_id"]
    before = team.unread(team.ada)
    add(team.ada, "unread", "x\n")
    commit(team.ada, f"x\n\nThrum-Thread: {thread}\n")
    assert "Yes." in team.ada.ok("why", "unread:1")
    assert team.unread(team.ada) == before and "Yes." in before


def test_without_a_daemon_git_still_answers(team, talk):
    team.ada.ok("daemon", "stop")
    try:
        text = team.bob.ok("why", "src/main.c:2")
        assert "Two passes" in text and "@bob" in text and talk[0] in text and "Its messages cannot be read: " in text
        assert "problem" in team.bob.json("why", "src/main.c:2")
    finally:
        team.ada.ok("daemon", "start")


@pytest.mark.parametrize("what, words", [
    ("src/main.c", "names no line; write FILE:LINE"), ("src/main.c:", "names no line"), (":3", "names no line"),
    ("src/main.c:x", "names no line"),
    ("src/main.c:-1", "names no line"), ("src/main.c:٣", "names no line"), ("src/main.c:" + "9" * 5000, "names no line"),
    ("src/main.c:0", "src/main.c has no line 0; it has 3"), ("src/main.c:4", "has no line 4"), ("nothing:1", "nothing is not there"),
    ("src:1", "src is no file"), ("/etc/passwd:1", "is outside of"), ("../repo/x:1", "is outside of"), (".:1", "is no file"),
    ("untracked:1", "never committed: git does not track it"), ("empty:1", "empty is empty"), ("binary:1", "binary file"),
    ("link:1", "link is no file"), ("\x1b[2J:1", "is not there"), ("src/main.c\n:1", "is not there")])
def test_one_clear_error(team, talk, what, words):
    (team.bob.path / "untracked").write_text("x\n")
    add(team.bob, "empty", "")
    add(team.bob, "binary", b"a\0b\n")
    if not (team.bob.path / "link").is_symlink():
        (team.bob.path / "link").symlink_to("src/main.c")
    assert words in error_line(team.bob.run("why", what))


def test_before_anything_is_committed(make_repo):
    repo = make_repo(commit=False)
    repo.join("ada", "planner")
    add(repo, "a", "x\n")
    assert "not committed yet" in repo.ok("why", "a:1")


def test_files_of_all_names_and_kinds(team):
    names = ("a b", "co:lon", ":(top)x", "*?[z]", "new\nline", "-dash", "ü€", "a:1")
    for name in names:
        add(team.ada, name, "one\r\ntwo")
    sha = commit(team.ada, "Names\n")
    for name in names:
        report = team.ada.json("why", f"./{name}:2")
        assert (report["file"], report["commit"]["sha"]) == (name, sha)
    team.ada.git("mv", "a b", "moved")
    assert team.ada.json("why", "moved:1")["commit"]["sha"] == sha
    team.ada.git("commit", "-qm", "move", "--no-verify")
    assert team.ada.json("why", "moved:1")["commit"]["sha"] == sha
    with open(os.fsencode(team.ada.path) + b"/\xff", "wb") as file:
        file.write(b"\xfe\n")
    team.ada.git("add", "-A")
    commit(team.ada, "Bytes\n")
    done = subprocess.run([*team.ada.command("why"), b"\xff:1"], cwd=team.ada.path, env=CLEAN, capture_output=True)
    assert done.returncode == 0 and b"Bytes" in done.stdout, done


def test_what_others_wrote_is_shown_not_obeyed(team):
    add(team.ada, "poison", POISON + "\n")
    commit(team.ada, f"{POISON}\n\nThrum-Thread: thr_{POISON}\nThrum-Agent: {POISON}\n", GIT_AUTHOR_NAME=POISON.replace("\r", ""))
    for args in ((), ("--json",)):
        text = team.ada.ok("why", "poison:1", *args)
        assert not raw_in(text), text


def test_settings_of_the_user_do_not_change_the_answer(team, talk):
    settings = {"log.showSignature": "true", "log.date": "relative", "i18n.logOutputEncoding": "latin1", "blame.showEmail": "true",
                "color.ui": "always", "log.decorate": "full", "blame.coloring": "highlightRecent", "format.pretty": "raw"}
    expected = team.bob.json("why", "src/main.c:2")
    for key, value in settings.items():
        team.ada.git("config", key, value)
    try:
        assert team.bob.json("why", "src/main.c:2") == expected
    finally:
        for key in settings:
            team.ada.git("config", "--unset", key)


def test_the_agent_of_a_commit_that_only_a_work_context_knows(team, talk, monkeypatch, capfd):
    """What an agent's session says of its commits serves where they carry no trailer."""
    sha = team.bob.json("why", "src/main.c:1")["commit"]["sha"]

    class Fake(thrum.Client):
        def call(self, method, **params):
            if method == "agent.listContext":
                assert params["fresh"] is True      # that of the last heartbeat may be older than the commit
                return {"contexts": [{"agent_id": "cy", "unmerged_commits": [{"sha": "0" * 40}]},
                                     {"agent_id": "bob", "unmerged_commits": [{"sha": sha}]}, {"agent_id": "zoe"}]}
            return super().call(method, **params)
    monkeypatch.setattr(thrum, "Client", Fake)
    monkeypatch.chdir(team.bob.path)
    assert thrum.main(["why", "src/main.c:1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["agent_id"] == "bob"
