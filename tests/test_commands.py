"""The commands as agents call them: two agents in two worktrees, through the launcher."""

import json
import os
import re
import shutil
import subprocess

import pytest

import thrum
from conftest import CLEAN, QUICK, SCRIPT, Repo
from team import Team, confined, error_line, finish, one_document, script, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    made = Team(tmp_path_factory.mktemp("commands") / "two agents – größer")     # blanks and non-ASCII in every path
    yield made
    made.close()


@pytest.fixture
def fresh(team):
    """The team with nothing unread."""
    team.clear()
    return team


# ---------------------------------------------------------------- a conversation

def test_a_conversation(fresh):
    """What one sends the other reads, answers, and both see it: the product in one test."""
    ada, bob = fresh.ada, fresh.bob
    out = ada.ok("send", "Parser is ready for review", "--to", "@bob")
    sent = re.match(r"✓ Message sent: (msg_\w{26})\n  To: @bob\n$", out)[1]
    assert "0/1 read" in ada.ok("sent", "--limit", "1")
    assert [m["message_id"] for m in bob.json("inbox", "--unread")["messages"]] == [sent]
    assert bob.json("inbox", "--unread")["unread"] == 1, "--unread is a peek"
    text = bob.ok("inbox")
    assert "Parser is ready for review" in text and "@ada" in text and "Showing 1-" in text
    assert bob.json("inbox", "--unread")["messages"] == []
    assert "1/1 read" in ada.ok("sent", "--limit", "1") and "@bob(read)" in ada.ok("sent", "--limit", "1")
    assert bob.ok("inbox", "--unread") == "No unread messages for @bob.\n"

    answer = re.match(r"✓ Reply sent: (msg_\w{26})\n  Thread: (thr_\w{26})\n  To: @ada\n$", bob.ok("reply", sent, "Looks good"))
    assert answer[2] == "thr_" + sent[4:], "a thread has the name of its first message"
    got = ada.json("inbox", "--unread")["messages"]
    assert [(m["message_id"], m["reply_to"], m["thread_id"]) for m in got] == [(answer[1], sent, answer[2])]
    again = ada.json("reply", answer[1], "Thanks")
    assert again["thread_id"] == answer[2] and [r["agent_id"] for r in again["recipients"]] == ["bob"]
    assert ada.json("inbox", "--unread")["messages"] == [], "who answers has read"


def test_to_a_role_a_group_and_everyone(fresh):
    """Routing by every kind of name; a role warns on stderr, an agent and everyone do not (contract, 86 and 88)."""
    ada = fresh.ada
    for to, warned in (("@bob", False), ("@implementer", True), ("@everyone", False), ("bob", False)):
        done = ada.run("send", f"for {to}", "--to", to, check=0)
        assert ("resolved to a group" in done.stderr) is warned, to
    ada.ok("group", "create", "pair-team", "--description", "two")
    ada.ok("group", "add", "pair-team", "@bob")
    ada.ok("send", "for the group", "--to", "@pair-team")
    ada.ok("send", "for all", "-b")
    ada.ok("send", "for all too")
    ada.ok("send", "mentioned", "--mention", "@bob,@ada")
    assert fresh.unread() == ["mentioned", "for all too", "for all", "for the group", "for bob", "for @everyone", "for @implementer",
                              "for @bob"]
    assert fresh.unread(ada) == [], "one's own mail is not in one's inbox"


def test_unknown_recipients_refuse_the_send(fresh):
    """One unknown name and nothing is stored, not even for those who exist (contract, 35, 41 and 85)."""
    before = fresh.trace()
    text = error_line(fresh.ada.run("send", "x", "--to", "@ghost", "--mention", "@bob,@spook"))
    assert text == "unknown recipients: @ghost, @spook — no matching agent, role, or group found"
    assert fresh.trace() == before and fresh.unread() == []


def test_bodies_from_stdin_and_files(fresh):
    """`-` and --body-file carry any text; a file is found from the caller's directory."""
    ada, text = fresh.ada, "line one\n\n\tindented `code` $HOME \"quoted\" – ünïcode 🎉\n"
    folder = ada.path / "sub dir"
    folder.mkdir(exist_ok=True)
    (folder / "body.md").write_text(text)
    ada.ok("send", "-", "--to", "@bob", input=text)
    ada.ok("send", "--body-file", "body.md", "--to", "@bob", cwd=folder)
    ada.ok("send", "--to", "@bob", "--body-file=sub dir/body.md")
    sent = ada.json("send", "--body-file", "-", "--to", "@bob", input=text)["message_id"]
    assert fresh.unread() == [text] * 4
    fresh.bob.ok("reply", sent, "-", input=text)
    ada.ok("message", "edit", sent, "-", input="edited\n")
    assert fresh.unread(ada) == [text]
    assert ada.json("message", "get", sent)["message"]["body"]["content"] == "edited\n"
    shutil.rmtree(folder)


def test_the_longest_body(fresh):
    """The longest that fits arrives whole; one byte more is refused, with the limit in the text, and leaves nothing."""
    ada = fresh.ada
    text = error_line(ada.run("send", "-", "--to", "@bob", input="x" * 70_000))
    size = int(re.search(r"([\d,]{6,}) bytes", text)[1].replace(",", ""))
    assert f"{thrum.LINE_MAX:,}" in text
    longest = "y" * (thrum.LINE_MAX - (size - 70_000))
    before = fresh.trace()
    error_line(ada.run("send", "-", "--to", "@bob", input=longest + "y"))
    assert fresh.trace() == before
    ada.ok("send", "-", "--to", "@bob", input=longest)
    assert fresh.unread() == [longest]
    assert "larger than" in error_line(ada.run("send", "-", "--to", "@bob", input="x" * (thrum.REQUEST_MAX + 1)))


def test_edit_and_delete(fresh):
    """The author may edit and take back; another may not; the deleted are hidden from lists but can be looked at."""
    ada, bob = fresh.ada, fresh.bob
    sent = fresh.mail("first")
    assert error_line(bob.run("message", "edit", sent, "mine")) == "only message author can edit (author: ada, current: bob)"
    assert "only message author can delete" in error_line(bob.run("message", "delete", sent, "--force"))
    assert ada.ok("message", "edit", sent, "second") == f"✓ Message edited: {sent} (version 1)\n"
    assert "(edited)" in bob.ok("inbox", "--unread") and fresh.unread() == ["second"]
    found = ada.json("message", "get", sent)["message"]
    assert found["body"]["content"] == "second" and found["updated_at"]
    assert error_line(ada.run("message", "delete", sent)) == "use --force to confirm deletion"
    assert ada.ok("message", "delete", sent, "--force", "--reason", "too early") == f"✓ Message deleted: {sent}\n"
    assert fresh.unread() == []
    assert "Status:     DELETED (too early)" in bob.ok("message", "get", sent)
    assert bob.json("message", "get", sent)["message"]["deleted"] is True
    assert error_line(ada.run("message", "edit", sent, "x")) == f"cannot edit deleted message: {sent}"
    assert error_line(ada.run("message", "delete", sent, "--force")) == f"message already deleted: {sent}"


def test_reading_marks_exactly_what_was_shown(fresh):
    """`inbox --limit` marks its page, `message get` its message, `message read` what it names, `--all` the rest."""
    bob = fresh.bob
    ids = [fresh.mail(f"mail {n}") for n in range(6)]
    bob.ok("inbox", "--limit", "2")
    assert fresh.unread() == ["mail 3", "mail 2", "mail 1", "mail 0"]
    assert "From:       @ada\n" in bob.ok("message", "get", ids[0])
    assert bob.ok("message", "read", ids[1], ids[1]) == "✓ Marked 1 message as read\n"
    assert fresh.unread() == ["mail 3", "mail 2"]
    assert fresh.ada.json("message", "read", ids[2])["marked_count"] == 0, "a sender cannot read for the receiver"
    assert fresh.unread() == ["mail 3", "mail 2"]
    assert bob.ok("message", "read", "--all") == "✓ Marked 2 messages as read\n"
    assert bob.ok("message", "read", "--all") == "No unread messages.\n"
    assert bob.ok("message", "read", "msg_unknown") == "✓ Marked 0 messages as read\n"
    assert fresh.ada.ok("sent", "show", ids[0]).startswith(f"Message:    {ids[0]}\n")
    assert error_line(bob.run("sent", "show", ids[0])) == f"message {ids[0]} was not authored by the current agent"


def test_pages_filters_and_order(fresh):
    """Newest first or oldest first, pages without gap or overlap, and each filter narrows."""
    ada, bob = fresh.ada, fresh.bob
    scope = f"module:filter-{fresh.seq()}"
    for n in range(5):
        ada.ok("send", f"page {n}", "--to", "@bob", "--scope", scope)
    ada.ok("send", "a broadcast", "--scope", scope)

    def texts(*args):
        return [m["body"]["content"] for m in bob.json("inbox", "--unread", "--scope", scope, *args)["messages"]]
    assert texts() == ["a broadcast", "page 4", "page 3", "page 2", "page 1", "page 0"]
    assert texts("--oldest") == texts()[::-1]
    assert [texts("--page-size", "4", "--page", str(n)) for n in (1, 2, 3)] == [texts()[:4], texts()[4:], []]
    assert texts("--limit", "1", "--page-size", "4") == ["a broadcast"], "--limit wins"
    assert texts("--mentions") == texts()[1:]
    assert texts("--from", "@ada") == texts() and texts("--from", "nobody-else") == []
    page = bob.json("inbox", "--unread", "--scope", scope, "--limit", "4")
    assert (page["total"], page["page"], page["page_size"], page["total_pages"]) == (6, 1, 4, 2)
    shown = bob.ok("inbox", "--unread", "--scope", scope, "--limit", "4", "--page", "2")
    assert "Showing 5-6 of 6 messages" in shown
    for bad in ("-1", "0"):
        done = bob.run("inbox", "--unread", "--scope", scope, "--page", bad)
        assert done.returncode == 1 or "Showing 1-6 of 6" in done.stdout, done.stdout
    assert "No messages matching filter --scope no:where" in bob.ok("inbox", "--scope", "no:where")
    assert len(ada.json("inbox", "--all", "--limit", "100")["messages"]) < len(bob.json("inbox", "--all", "--limit", "100")["messages"]), \
        "--all shows everybody's messages but one's own"


def test_sent_filters(fresh):
    """`sent` narrows by recipient and to what somebody has not read; newest first."""
    ada, bob = fresh.ada, fresh.bob
    first, second = fresh.mail("first"), fresh.mail("second")
    bob.ok("message", "read", first)
    listed = [m["message_id"] for m in ada.json("sent", "--to", "@bob", "--limit", "2")["messages"]]
    assert listed == [second, first]
    unread = ada.json("sent", "--unread", "--limit", "100")["messages"]
    assert second in [m["message_id"] for m in unread] and first not in [m["message_id"] for m in unread]
    assert all(m["agent_id"] == "ada" for m in unread)
    assert ada.ok("sent", "--to", "@nobody-here") == "No sent messages match.\n"
    page = ada.json("sent", "--page-size", "1", "--page", "2")
    assert [m["message_id"] for m in page["messages"]] == [first] and page["total_pages"] == page["total"]


# ---------------------------------------------------------------- wait

def test_wait_has_three_ends(fresh):
    """0: a message, 1: the time is up, 2: it could not wait (decision 1)."""
    bob = fresh.bob
    done = bob.run("wait", "--timeout", "0s", check=1)
    assert (done.stdout, done.stderr) == ("", "NO_MESSAGES_TIMEOUT — re-run thrum wait to continue listening\n")
    assert bob.run("wait", "--timeout", "0s", "--json", check=1).stdout == ""
    done = bob.run("wait", "--timeout", "0s", "--quiet", check=1)
    assert (done.stdout, done.stderr) == ("", "")
    for bad in (["--nope"], ["--timeout"], ["--timeout", "30"], ["--timeout", "soon"], ["--scope", "x"],
                ["--after-seq", "x"], ["--after", "x"], ["-p"], [b"\xff"]):
        done = subprocess.run([bob.launcher, "wait", *bad], cwd=bob.path, env=CLEAN, capture_output=True, text=True, timeout=20)
        error_line(done, 2)
    error_line(bob.run("wait", env={"THRUM_NAME": "ghost"}), 2)
    error_line(bob.run("wait", env={"THRUM_SOCKET": "/nowhere/s"}), 2)
    error_line(bob.run("wait", cwd="/", command=QUICK), 2)
    fresh.mail("for wait")
    first = bob.run("wait", "--unread", "--timeout", "5s", check=0).stdout
    assert first.startswith("MESSAGES_RECEIVED\n") and "@ada: for wait" in first
    assert bob.json("wait", "--unread")["count"] == 1, "waiting marks nothing as read"


def test_wait_wakes_for_what_it_is_asked_for(fresh):
    """Each filter wakes for its message and sleeps through the others'; `--after-seq` has no gap."""
    ada, bob = fresh.ada, fresh.bob
    seq = fresh.seq()
    parent = fresh.mail("direct")
    thread = ada.json("reply", parent, "in the thread")["thread_id"]
    ada.ok("send", "scoped", "--to", "@ada", "--scope", "module:auth")
    bob.ok("send", "bob's own", "--to", "@ada")

    def got(*args):
        done = bob.run("wait", "--after-seq", str(seq), "--timeout", "0s", "--json", *args)
        return [m["body"]["content"] for m in json.loads(done.stdout)["messages"]] if done.returncode == 0 else []
    assert got() == ["direct", "in the thread"], "oldest first, and nothing that was for others"
    assert got("--all") == ["direct", "in the thread", "scoped"]
    assert got("--thread", thread) == ["direct", "in the thread"]
    assert got("--from", "@ada") == ["direct", "in the thread"] and got("--from", "@zoe") == []
    assert got("--scope", "module:auth") == ["scoped"]
    assert got("--mention", "@bob") == ["direct", "in the thread"]
    found = bob.json("wait", "--after-seq", str(seq))
    assert got("--after-seq", str(found["after_seq"])) == [], "the number it gives leads on without a gap or a repetition"
    assert found["status"] == "received" and found["action"].startswith("ACTION REQUIRED: You have unread messages.")
    assert "thrum inbox --unread" in found["action"]
    assert bob.run("wait", "--after", "-60s", "--timeout", "0s").returncode == 0
    assert bob.run("wait", "--after", "+0s", "--timeout", "0s").returncode == 1
    assert bob.run("wait", "--after=30s", "--timeout", "0s").returncode == 1


def test_wait_is_woken(fresh):
    """A waiting command ends when the message comes, long before its time is up."""
    process = start(fresh.bob, "wait", "--after-seq", str(fresh.seq()), "--timeout", "60s")
    fresh.mail("wake up")
    status, out, err = finish(process)
    assert (status, err) == (0, "") and "@ada: wake up" in out


def test_wait_does_not_report_own_messages(fresh):
    """A sender's own broadcast does not wake it (contract, 87)."""
    fresh.bob.ok("send", "my own broadcast")
    assert fresh.bob.run("wait", "--after", "-5s", "--timeout", "100ms", "--from", "bob").returncode == 1


# ---------------------------------------------------------------- --quiet, global flags (JSON: test_contract_cli.py)

@pytest.fixture(scope="module")
def known(team):
    """Things that commands need to exist."""
    if "shapes" not in team.ada.ok("group", "list"):
        team.ada.ok("group", "create", "shapes")
    return team


def filled(team, words):
    """A command line with what it names made for it."""
    make = {"{theirs}": lambda: team.mail("to ada", team.bob, "@ada"), "{own}": lambda: team.mail("to bob"),
            "{new}": lambda: f"g{team.seq()}"}
    team.ada.ok("session", "start") if words.split()[-1] == "end" else None
    return [make[word]() if word in make else word for word in words.split()]


QUIET = ["send hello --to @implementer", "reply {theirs} answer", "sent", "message edit {own} text", "message delete {own} --force",
         "message read {theirs}", "message read --all", "group create {new}", "group add shapes @bob", "group list",
         "session set-intent words", "session set-task words", "agent set-intent words", "init", "daemon restart",
         "wait --after-seq 0 --all"]
LOUD = ["quickstart --name ada --role planner --module core", "status",
        "whoami", "agent list", "agent whoami", "session list", "session start",
        "agent register --name ada --role planner --module core --re-register", "message get {own}", "sent show {own}", "version",
        "daemon status", "inbox", "session heartbeat"]


@pytest.mark.parametrize("words", QUIET)
def test_quiet_says_nothing(known, words):
    """--quiet: a success says nothing on either stream (contract 1.9)."""
    if "wait" in words:
        known.mail()
    done = known.ada.run(*filled(known, words), "--quiet", check=0)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("words", LOUD)
def test_quiet_keeps_answers(known, words):
    """--quiet takes nothing from who asked for something (contract 1.9: no effect, or only the tip)."""
    assert known.ada.ok(*filled(known, words), "--quiet")


def test_quiet_keeps_mail_and_errors(fresh):
    fresh.mail("quietly")
    assert "quietly" in fresh.bob.ok("inbox", "--quiet")
    assert "no such" not in error_line(fresh.bob.run("--quiet", "message", "get", "msg_nope"))


def test_global_flags_before_and_after(fresh):
    """A global flag means the same in front of the command, between its words and behind it."""
    ada = fresh.ada
    expected = ada.json("agent", "list")["agents"]["agents"][0]["agent_id"]
    for line in (["--json", "agent", "list"], ["agent", "--json", "list"], ["agent", "list", "--json=true"],
                 ["--json", "--quiet", "agent", "list"]):
        assert json.loads(ada.ok(*line))["agents"]["agents"][0]["agent_id"] == expected, line
    assert json.loads(script(ada, "--repo", str(fresh.bob.path), "whoami", "--json", cwd="/", check=0).stdout)["agent_id"] == "bob"
    assert json.loads(script(ada, "whoami", f"--repo={fresh.bob.path}", "--json", cwd="/", check=0).stdout)["agent_id"] == "bob"
    assert not ada.ok("agent", "list", "--json=false").startswith("{")
    for line in (["--quiet", "--help"], ["--repo", ".", "--help"], ["-h"], ["--help"], []):
        assert ada.ok(*line) == ada.ok("help"), line
    for line in (["--version"], ["-v"], ["--quiet", "--version"]):
        assert ada.ok(*line) == ada.ok("version"), line
    assert "version" in ada.json("--version")


def test_the_last_flag_wins_and_lists_collect(fresh):
    """Contract 1.3: scalars keep the last value, lists all of them, also split at commas; a value may start with a dash."""
    ada = fresh.ada
    done = json.loads(ada.ok("send", "--to", "@ghost", "--to=@bob", "--scope", "a:b,c:d", "--scope=e:f", "--json", "--",
                             "--text that starts with dashes"))
    assert [r["agent_id"] for r in done["recipients"]] == ["bob"]
    found = ada.json("message", "get", done["message_id"])["message"]
    assert found["body"]["content"] == "--text that starts with dashes"
    assert [(s["type"], s["value"]) for s in found["scopes"]] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert "unknown recipients: @--json" in error_line(ada.run("send", "x", "--to", "--json"))


PARSE_ERRORS = {
    "inbox --nope": "unknown flag: --nope", "inbox --unrea": "unknown flag: --unrea", "--nope inbox": "unknown flag: --nope",
    "send x -p": "unknown shorthand flag: 'p' in -p", "send x --priority high": "unknown flag: --priority",
    "inbox --scope": "flag needs an argument: --scope", "inbox --limit x": 'invalid argument "x" for "--limit" flag: not a number',
    "inbox --repo": "flag needs an argument: --repo", "wait --nope": "unknown flag: --nope",
    "send": "accepts 1 arg(s), received 0", "message get": "accepts 1 arg(s), received 0",
    "message get a b": "accepts 1 arg(s), received 2",
    "group add": "accepts between 1 and 2 arg(s), received 0", "group add a b c": "accepts between 1 and 2 arg(s), received 3",
    "session set-intent": "accepts 1 arg(s), received 0", "group create": "accepts 1 arg(s), received 0",
    "nope": 'unknown command "nope" for "thrum"', "inbox --json=perhaps": 'invalid argument "perhaps" for "--json" flag',
    "send a b": "accepts 1 arg(s), received 2", "reply a": "accepts 2 arg(s), received 1",
    "message edit a b c": "accepts 2 arg(s), received 3",
    "message nope": 'unknown command "nope" for "thrum message"', "wait --after x": 'invalid --after duration "x": ',
    "wait --timeout 30": "invalid timeout: ", "message read": "requires at least 1 arg(s) or --all flag",
    "send x --broadcast --to @bob": "--broadcast and --to are mutually exclusive", "message delete m": "use --force to confirm deletion",
    "group add shapes": "provide a member argument or --role flag",
}


@pytest.mark.parametrize("words", PARSE_ERRORS)
def test_parse_errors_are_those_of_the_contract(team, words):
    """The texts that scripts know, with the daemon and by the script alone; `…` at most in what follows them."""
    for done in (team.ada.run(*words.split()), script(team.ada, *words.split())):
        text = error_line(done, 2 if words.startswith("wait") else 1)
        assert text.startswith(PARSE_ERRORS[words]), text


# ---------------------------------------------------------------- agents, sessions, groups

def test_agents_and_sessions(fresh):
    """Register, list, start, intent, task, heartbeat, end: each says what it did, and `status` and `list` show it."""
    bob = fresh.bob
    out = bob.ok("agent", "register", "--name", "cleo", "--role", "reviewer", "--module", "web")
    assert out == "✓ Agent registered: cleo\n"
    who = {"THRUM_NAME": "cleo"}
    try:
        assert "none (use 'thrum session start'" in bob.ok("status", env=who)
        assert error_line(bob.run("session", "set-intent", "x", env=who)) == \
            "no active session - start one with 'thrum session start'"
        assert error_line(bob.run("session", "end", env=who)) == "no active session to end"
        assert "no active session found for agent cleo" in error_line(bob.run("send", "x", env=who))
        first = bob.json("session", "start", env=who)["session_id"]
        second = bob.json("agent", "start", env=who)["session_id"]
        sessions = {s["session_id"]: s for s in bob.json("session", "list", "--agent", "cleo")["sessions"]}
        assert (sessions[first]["end_reason"], sessions[second]["status"]) == ("crash_recovered", "active")
        assert bob.ok("agent", "set-intent", "Working on authentication", env=who) == "✓ Intent set: Working on authentication\n"
        assert bob.ok("session", "set-task", "thrum-1", env=who) == "✓ Task set: thrum-1\n"
        assert bob.ok("agent", "heartbeat", env=who).startswith(f"✓ Heartbeat sent: {second}")
        assert "authentication" in bob.ok("status", env=who)
        listed = bob.ok("agent", "list")
        assert re.search(r"● @cleo .*active\)\n    Intent: Working on authentication", listed) and "@ada" in listed
        assert bob.ok("session", "set-intent", "", env=who) == "✓ Intent cleared\n"
        assert bob.ok("agent", "set-task", "", env=who) == "✓ Task cleared\n"
        assert bob.ok("agent", "end", "--reason", "lunch", env=who).startswith(f"✓ Session ended: {second}\n")
        assert "Reason:  lunch" in bob.ok("session", "list", "--agent", "@cleo")
        assert re.search(r"○ @cleo .*offline\)", bob.ok("agent", "list"))
        assert error_line(bob.run("session", "end", "--session-id", second)) == f"session {second} has already ended"
        assert re.search("(?i)no.*session|inactive|ended|stopped", bob.ok("status", env=who))
        assert bob.ok("agent", "list", "--role", "reviewer").startswith("Registered agents (1):")
        assert bob.ok("agent", "list", "--role", "nobody") == "No agents with that role and module.\n"
    finally:
        (bob.path / ".thrum/identities/cleo.json").unlink()


def test_registration_conflicts(fresh):
    """Same role and module: conflict, exit 1, no identity left; --force adds; the same again changes nothing (contract, 25)."""
    bob = fresh.bob
    before = fresh.trace()
    done = bob.run("agent", "register", "--name", "bob2", "--role", "implementer", "--module", "core", check=1)
    assert "✗ Registration conflict" in done.stdout and "--force" in done.stdout and "--re-register" in done.stdout and not done.stderr
    done = bob.run("agent", "register", "--name", "bob2", "--role", "implementer", "--module", "core", "--json", check=1)
    assert one_document(done.stdout)["conflict"]["existing_agent_id"] == "bob"
    assert fresh.trace() == before
    count = len(bob.json("agent", "list", "--role", "owner")["agents"]["agents"])
    for _ in range(2):
        assert "registered" in bob.ok("agent", "register", "--role", "owner", "--module", "all", "--force", "--display", "Leon")
    found = bob.json("agent", "list", "--role", "owner")["agents"]["agents"]
    assert len(found) == count + 1 and re.fullmatch("owner_[0-9a-z]{10}", found[0]["agent_id"]) and found[0]["display"] == "Leon"
    (bob.path / f".thrum/identities/{found[0]['agent_id']}.json").unlink()


def test_groups(fresh):
    """Create, add and list; the errors of the contract; a role's plural is no collision (contract, 45 to 49)."""
    ada = fresh.ada
    assert re.match(r"✓ Group created: test-team \(grp_\w{26}\)\n$", ada.ok("group", "create", "test-team", "--description", "For tests"))
    assert ada.ok("group", "add", "test-team", "@ada") == "✓ Added @ada to test-team\n"
    assert ada.ok("group", "add", "test-team", "bob") == "✓ Added @bob to test-team\n"
    assert ada.ok("group", "add", "test-team", "@bob") == "✓ Added @bob to test-team\n"
    assert re.search(r"^test-team .*2 members", ada.ok("group", "list"), re.M) and "For tests" in ada.ok("group", "list")
    ada.ok("group", "create", "planners")
    assert ada.ok("group", "add", "planners", "--role", "planner") == "✓ Added role:planner to planners\n"
    for line, text in {
            "create test-team": 'group "test-team" already exists', "create everyone": 'group "everyone" already exists',
    "create ada": 'group name "ada" is taken', "create planner": 'group name "planner" is taken', "create all": "group name 'all' is",
    "create ../x": "group name ",
            "add nope @bob": 'group "nope" not found', "add test-team @ghost": 'agent "ghost" not found',
            "add test-team @planners": 'agent "planners" not found', "add test-team --role ghost": 'role "ghost" not found',
            "add everyone @bob": "cannot modify members of built-in @everyone group"}.items():
        before = fresh.seq()
        assert error_line(ada.run("group", *line.split())).startswith(text), line
        assert fresh.seq() == before


def test_quickstart(fresh):
    """It registers, starts a session and sets an intent; again without a name it is the same agent with a new session."""
    ada = fresh.ada
    other = ada.worktree(f"w{fresh.seq()}")
    error_line(other.run("quickstart", "--name", "finn", "--role", "coordinator"))
    first = other.json("quickstart", "--name", "finn", "--role", "coordinator", "--module", "all", "--display", "Finn F.")
    assert first["register"] == {"agent_id": "finn", "status": "registered"}
    assert first["intent"]["intent"] == f"Coordinate agents and tasks in {other.path.name}"
    identity = json.loads((other.path / ".thrum/identities/finn.json").read_text())
    assert {k.lower(): v for k, v in identity["agent"].items()} == {
        "kind": "agent", "name": "finn", "role": "coordinator", "module": "all", "display": "Finn F."}
    assert (identity["version"], identity["worktree"]) == (3, other.path.name)
    assert identity["session_id"] == first["session"]["session_id"] and identity["updated_at"]
    assert (other.path / ".thrum/identities/finn.json").stat().st_mode & 0o777 == 0o600
    identity["theirs"] = {"kept": True}
    (other.path / ".thrum/identities/finn.json").write_text(json.dumps(identity))
    again = other.ok("quickstart", "--intent", "Go on")
    assert again.startswith("✓ Registered as @finn (coordinator, all)\n✓ Session started: ses_") and "✓ Intent set: Go on" in again
    assert json.loads((other.path / ".thrum/identities/finn.json").read_text())["theirs"] == {"kept": True}
    sessions = other.json("session", "list", "--agent", "finn")["sessions"]
    assert [s["status"] for s in sessions] == ["active", "ended"] and sessions[0]["session_id"] != first["session"]["session_id"]
    assert "(1 unread)" in (ada.ok("send", "hi", "--to", "@finn") and other.ok("quickstart"))
    second = other.json("quickstart", "--name", "gus", "--role", "coordinator", "--module", "all")
    assert second["register"]["status"] == "registered", "a second name with the same role and module is added, not refused"
    assert {"finn", "gus"} <= {a["agent_id"] for a in other.json("agent", "list", "--role", "coordinator")["agents"]["agents"]}
    newest = other.json("status", env={"THRUM_ROLE": "tester", "THRUM_MODULE": "e2e"})["agent"]["agent_id"]
    assert newest == "gus", "of several the newest of this worktree, also where the environment names a role"


def test_what_is_suggested_works(fresh):
    """The commands under `Next:` can be pasted into a shell as they stand, also with blanks in the path."""
    out = fresh.ada.ok("quickstart")
    suggested = [line[2:].split("  ")[0] for line in out.partition("Next:\n")[2].splitlines()]
    assert len(suggested) >= 3
    for line in suggested:
        line = line.replace("@NAME", "@bob").replace("--timeout 5m", "--timeout 0s")
        done = subprocess.run(["sh", "-c", line], cwd=fresh.ada.path, env=CLEAN, capture_output=True, text=True, timeout=20)
        assert done.returncode == (1 if " wait " in line else 0) and "Error" not in done.stderr, (line, done.stderr)


def test_no_identity_file_nobody_registered(fresh):
    """Where the identity file cannot be written, the agent is not registered either."""
    command = confined(*fresh.bob.command())
    if not command:
        pytest.skip("no setpriv, and root may write everywhere")
    folder = fresh.bob.path / ".thrum/identities"
    before = fresh.trace()
    folder.chmod(0o555)
    try:
        for words in ("agent register --name hal --role tester --module core", "quickstart --name hal --role tester --module core"):
            assert "Permission denied" in error_line(fresh.bob.run(*words.split(), command=command)), words
    finally:
        folder.chmod(0o755)
    assert fresh.trace() == before


# ---------------------------------------------------------------- who is calling, from where

def test_from_a_subdirectory_and_from_elsewhere(fresh):
    """A command finds its worktree from below it, by --repo, by THRUM_HOME and by the launcher's own place."""
    bob = fresh.bob
    deep = bob.path / "src dir" / "ä"
    deep.mkdir(parents=True)
    name = json.loads(bob.ok("whoami", "--json", cwd=deep))["agent_id"]
    assert name == json.loads(script(bob, "whoami", "--json", cwd=deep, check=0).stdout)["agent_id"] == "bob"
    for more in ({"env": {"THRUM_HOME": str(bob.path)}}, {"env": {"THRUM_HOME": str(deep)}}, {}):
        assert bob.json("whoami", cwd="/", **more)["agent_id"] == "bob", more
        bob.ok("send", "from afar", "--to", "@ada", cwd="/", **more)
    assert fresh.unread(fresh.ada) == ["from afar"] * 3
    assert fresh.ada.json("whoami", "--repo", str(bob.path))["agent_id"] == "bob"
    assert fresh.ada.json("whoami", env={"THRUM_HOME": str(bob.path)})["agent_id"] == "bob"
    for args in (["--repo", "/nowhere"], ["--repo", "/"]):
        error_line(bob.run("inbox", *args))
    error_line(bob.run("inbox", env={"THRUM_HOME": "/nowhere"}))
    shutil.rmtree(bob.path / "src dir")


def test_environment_says_who(fresh):
    """THRUM_NAME picks the identity, THRUM_AGENT_ID is taken as it is, role and module override, in this order of strength."""
    bob = fresh.bob
    bob.ok("agent", "register", "--name", "dora", "--role", "tester", "--module", "core")
    try:
        assert bob.json("whoami", env={"THRUM_NAME": "bob"})["agent_id"] == "bob"
        assert bob.json("whoami", env={"THRUM_NAME": "dora"})["agent_id"] == "dora"
        assert bob.json("whoami")["agent_id"] == "dora", "of several for this worktree the newest"
        sent = bob.json("send", "as ada", "--to", "@dora", env={"THRUM_AGENT_ID": "ada"})["message_id"]
        assert bob.json("message", "get", sent)["message"]["author"]["agent_id"] == "ada"
        assert bob.json("status", env={"THRUM_NAME": "bob", "THRUM_ROLE": "x", "THRUM_MODULE": "y"})["agent"]["agent_id"] == "bob"
        words = ["quickstart", "--name", "else", "--role", "tester", "--module", "core"]
        assert bob.run(*words, "--quiet", env={"THRUM_NAME": "dora"}, check=0).stderr == ""
        note = bob.run(*words, env={"THRUM_NAME": "dora"}, check=0)
        assert note.stderr == "Note: THRUM_NAME is 'dora' and counts, not --name else\n" and "@dora" in note.stdout
        assert "--role and --module" not in bob.ok("quickstart", env={"THRUM_NAME": "eve", "THRUM_ROLE": "guest", "THRUM_MODULE": "m"})
        assert bob.json("whoami", env={"THRUM_NAME": "eve"})["role"] == "guest"
    finally:
        for name in ("dora", "eve"):
            (bob.path / f".thrum/identities/{name}.json").unlink()
    for env, text in (({"THRUM_NAME": "ghost"}, "ghost"), ({"THRUM_NAME": "../x"}, "THRUM_NAME"), ({"THRUM_NAME": "Bob"}, "THRUM_NAME"),
                      ({"THRUM_AGENT_ID": "../x"}, "THRUM_AGENT_ID")):
        before = fresh.trace()
        assert text in error_line(bob.run("send", "x", env=env)), env
        assert fresh.trace() == before


def test_whoami_without_a_daemon(make_repo):
    """whoami answers from the file when there is no daemon and starts none; with one, from the daemon."""
    repo = make_repo()
    assert error_line(repo.run("whoami")).startswith("thrum is not initialized in ")
    repo.ok("init")
    assert "no agent identities registered" in error_line(repo.run("whoami"))
    repo.join("solo")
    assert repo.json("whoami")["source"] == "daemon"
    repo.ok("daemon", "stop")
    for name in ("whoami", "agent whoami"):
        found = repo.json(*name.split())
        assert (found["agent_id"], found["source"], found["identity_file"]) == ("solo", "file", ".thrum/identities/solo.json")
    assert "Agent ID:  solo" in repo.ok("whoami") and not (repo.var / "thrum.sock").exists()
    assert error_line(repo.run("inbox")).startswith("failed to connect to daemon: it was stopped; 'thrum daemon start'")
    assert repo.run("daemon", "status", check=1).stdout == "Daemon:   not running\n"
    assert repo.json("daemon", "status")["status"] == "stopped"
    assert error_line(repo.run("daemon", "stop")) == "daemon is not running"
    assert "started" in repo.ok("daemon", "start")
    assert "already running" in error_line(repo.run("daemon", "start"))
    assert repo.run("inbox", check=0).stdout == "No messages for @solo.\n"


# ---------------------------------------------------------------- bad input

BAD = {
    "agent register --name ../x --role r --module m": "invalid characters",
    "agent register --name Bad --role r --module m": "invalid characters",
    "agent register --name daemon --role r --module m": "reserved", "agent register --name user_x --role r --module m": "reserved",
    "agent register --name a/b --role r --module m": "invalid characters",
    "agent register --name .. --role r --module m": "invalid characters",
    "quickstart --name ../x --role r --module m": "invalid agent name", "quickstart --name Ada --role r --module m": "invalid agent name",
    "quickstart --name system --role r --module m": "reserved", "quickstart --name x --role x --module m": "cannot be the same as its role",
    "quickstart --name x --role ../r --module m": "role '../r' is invalid",
    "quickstart --name planner --role r --module m": "conflicts with existing role",
    "quickstart --name n2 --role ada --module m": "conflicts with existing agent",
    "agent register --name n2": "role and module are required",
    "quickstart --name n2 --role r": "--role and --module are required", "agent register --name n2 --role r --module m\x1b[31m": "module",
    "send x --scope plain": "invalid scope: scope must be in 'type:value' format, got: plain", "send x --scope :v": "invalid scope",
    "send x --scope t:": "invalid scope", "send x --ref nope": "invalid ref: ref must be in 'type:value' format, got: nope",
    "inbox --scope nope": "scope must be in 'type:value' format, got: nope", "send x --structured [1]": "invalid structured data",
    "send x --structured {": "invalid structured data", "send x --structured {\"a\":NaN}": "invalid structured data",
    "send x --format html": "invalid format: html (must be 'markdown', 'plain', or 'json')", "send x --thread thr_none": "thread not found",
    "send x --body-file /nowhere": "cannot read the text: No such file or directory: /nowhere",
    "send --body-file .": "cannot read the text: Is a directory",
    "reply msg_none x": "failed to get parent message", "message get msg_none": "message not found: msg_none",
    "message edit msg_none x": "message not found",
    "message delete msg_none --force": "message not found", "sent show msg_none": "message not found", "sent --to @": "invalid to filter",
    "session end --session-id ses_none": "session not found: ses_none", "session heartbeat --add-scope x": 'invalid scope format',
    "session heartbeat --add-ref x": "invalid ref format", "send -b x --everyone": "--broadcast and --to",
    "init --nope": "unknown flag: --nope",
    "send x --to @a\nb": "unknown recipients", "send x --scope a\nb": "invalid scope", f"send x --to {'n' * 5000}": "unknown recipients",
    f"quickstart --name {'n' * 65} --role r --module m": "longer than 64", f"send x --scope {'t' * 257}:v": "invalid scope",
    "help nope": "unknown command",
    "daemon restart --from /nowhere": "/nowhere is not a file", "setup": "cannot setup redirect to self",
    "quickstart --bad": "unknown flag: --bad",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_refused_without_a_trace(team, line):
    """One clear line, exit 1, no event, no file."""
    if line == "sent --to @":
        words = line.split()
    elif line.startswith("send x --body-file"):
        words = ["send", *line.split()[2:]]
    else:
        words = line.split(" ")
    before = team.trace()
    text = error_line(team.ada.run(*words))
    assert BAD[line] in text, text
    assert team.trace() == before


@pytest.mark.parametrize("words", [["send", ""], ["send", "-"], ["reply", "{theirs}", ""], ["send", "--body-file", "-"],
                                   ["send", "--to", "@bob", ""]])
def test_empty_content(fresh, words):
    """An empty text is refused in the contract's words."""
    words = [fresh.mail("x", fresh.bob, "@ada") if word == "{theirs}" else word for word in words]
    before = fresh.trace()
    assert error_line(fresh.ada.run(*words)) == "content is required"
    assert fresh.trace() == before


def test_an_empty_name_is_not_everyone(fresh):
    """`--to "$UNSET"` must not publish what was meant for one."""
    before = fresh.trace()
    error_line(fresh.ada.run("send", "private", "--to", ""))
    assert fresh.trace() == before


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\xed\xa0\x80", b"nul\0"])
def test_not_utf8(fresh, bad, tmp_path):
    """Text that is not UTF-8 (or has a NUL) is refused wherever it comes from, and stored nowhere."""
    ada = fresh.ada
    (tmp_path / "body").write_bytes(bad)
    before = fresh.trace()
    runs = [(["send", "-"], bad), (["send", "--body-file", str(tmp_path / "body")], b"")]
    if b"\0" not in bad:
        runs += [(words, b"") for words in (["send", bad], ["session", "set-intent", bad], [bad], ["group", "create", bad], ["help", bad])]
    for words, given in runs:
        done = subprocess.run([ada.launcher, *words], cwd=ada.path, env=CLEAN, input=given, capture_output=True, timeout=20)
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        text = error_line(done)
        assert "UTF-8" in text or "NUL" in text or "unknown command" in text, text
    assert fresh.trace() == before


BAD_IDENTITIES = [b"", b"{", b"[]", b"\xff\xfe", b'{"agent": 5}', b'{"agent": {"Name": 5, "Role": "r", "Module": "m"}}', b"[" * 60_000,
    b'{"agent": {"Name": "../x", "Role": "r", "Module": "m"}}', b'{"agent": {"Name": "a\\u001b[2J", "Role": "r", "Module": "m"}}',
                  b'{"agent": {"Name": "bob", "Role": "r", "Module": "m"}, "x": "' + b"y" * 70_000 + b'"}']


@pytest.mark.parametrize("bad", BAD_IDENTITIES, ids=range(len(BAD_IDENTITIES)))
def test_a_damaged_identity_file(team, bad):
    """It is named, with what is wrong; nobody guesses, overwrites it or stores anything."""
    bob = team.bob
    path = bob.path / ".thrum/identities/bob.json"
    good = path.read_bytes()
    path.write_bytes(bad)
    try:
        before = team.trace()
        for words in ("whoami", "send x", "inbox", "quickstart --name bob --role implementer --module core", "session start",
                      "agent register --name bob --role implementer --module core", "wait"):
            text = error_line(bob.run(*words.split()), 2 if words == "wait" else 1)
            assert "identity file bob.json is damaged" in text, (words, text)
        assert team.trace() == before
        done = bob.run("status")
        assert done.returncode == 1 or "damaged" in done.stdout, "status must not say that nobody is registered"
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("bad", ["", "{", "[1]", '{"daemon": []}', '{"daemon": 5}', '{"daemon": {"autostart": "no"}}',
                                 '{"daemon": {"local_only": 1}}', "[" * 60_000], ids=range(8))
def test_a_damaged_configuration(team, bad):
    """The file is named and left as it is."""
    path = team.ada.path / ".thrum/config.json"
    good = path.read_bytes()
    path.write_text(bad)
    try:
        # What a flag sets right is no longer wrong, so `--local` mends its own setting.
        for words in ("init",) if "local_only" in bad else ("init", "daemon start --local"):
            assert str(path) in error_line(team.ada.run(*words.split())), words
        assert path.read_text() == bad
        assert team.ada.run("send", "still works", "--to", "@bob").returncode == 0, "a running daemon is not the file's hostage"
    finally:
        path.write_bytes(good)


# ---------------------------------------------------------------- what only tells

def test_version(team):
    out = team.ada.ok("version")
    assert out.startswith(f"thrum v{thrum.__version__} (")
    found = team.ada.json("version")
    assert found["version"] == thrum.__version__ and os.path.isabs(found["path"]) and f"build: {found['build']}" in out
    assert Repo("/").run("version", command=SCRIPT).returncode == 0, "it needs no repository"


def test_status_says_what_is_there(fresh):
    """Agent, inbox and daemon; without an identity what to do (contract, 57)."""
    fresh.mail("count me")
    out = fresh.bob.ok("status")
    for part in ("Agent ID:  bob", "@implementer", "1 unread", "Daemon:    running (", f"v{thrum.__version__}"):
        assert part in out, out
    found = fresh.bob.json("status")
    assert found["health"]["status"] == "ok" and found["agent"]["role"] == "implementer" and found["inbox"]["unread"] == 1
    assert "quickstart" in script(fresh.ada.worktree("empty"), "status", check=0).stdout
