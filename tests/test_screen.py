"""What people see: text of others made harmless, lengths of time, tables; and the parser of command lines."""

import asyncio
import json

import pytest

import thrum
from team import POISON, RAW, Team, error_line, one_document, raw_in

NS = thrum.NS
ROWS = {**thrum.COMMANDS, **thrum.HERE}


# ---------------------------------------------------------------- characters

def test_plain_hides_what_a_terminal_obeys():
    """Each control character, and each that reorders text, becomes a visible escape; line ends and tabs stay."""
    for character in sorted(RAW):
        shown = thrum.plain(f"a{character}b")
        assert not raw_in(shown), hex(ord(character))
        assert f"{ord(character):02x}" in shown or f"{ord(character):04x}" in shown, shown
    assert thrum.plain("a\tb\nc") == "a\tb\nc" and thrum.plain("a\r\nb") == "a\nb"
    for text in ("plain", "ünïcode – 日本語 🎉 עברית عربي", "\U0001f469\u200d\U0001f680", ""):
        assert thrum.plain(text) == text
    assert not raw_in(thrum.plain("a\r\x1b\r\nb"))


def test_json_is_harmless_and_the_same():
    """to_json: nothing raw on the terminal, and reading it gives the value back."""
    value = {"text": POISON + "".join(sorted(RAW)) + "ünï 日本 עברית", "list": [POISON], POISON: 1}
    text = thrum.to_json(value)
    assert not raw_in(text) and one_document(text) == value
    assert thrum.to_json({"a": "ü日"}) == '{\n  "a": "ü日"\n}\n', "letters are shown as they are"


@pytest.mark.parametrize("text, limit, expected", [
    ("short", 10, "short"), ("  a \n\t b  ", 10, "a b"), ("x" * 10, 10, "x" * 10), ("x" * 11, 10, "x" * 9 + "…"), ("", 10, ""),
    ("line\nline", 100, "line line"), ("a\x1b[31mb", 100, "a\\x1b[31mb"), ("y" * 10_000, 100, "y" * 99 + "…")])
def test_one_line(text, limit, expected):
    assert thrum.one_line(text, limit) == expected


def test_one_line_is_one_harmless_line():
    for text in (POISON, "\u2028a\u2029b\x85c\x0bd\x0ce", "\n" * 500 + "x", "\x1b" * 300):
        shown = thrum.one_line(text, 40)
        assert "\n" not in shown and not raw_in(shown) and len(shown) <= 40


def test_wrapped():
    """Lines of at most the width, indented; blank lines and long words are kept; nothing is lost but blanks at a break."""
    text = "one two three four five six\n\n" + "x" * 50 + " end\n  indented"
    lines = thrum.wrapped(text, 20, "  ").split("\n")
    assert lines == ["  one two three four", "  five six", "", "  " + "x" * 50, "  end", "    indented"]
    words = " ".join(f"word{n}" for n in range(300))
    for width in (40, 41, 79, 200):
        shown = thrum.wrapped(words, width, "  ")
        assert max(map(len, shown.split("\n"))) <= width and shown.split() == words.split()
    assert not raw_in(thrum.wrapped(POISON, 40, "  "))
    assert thrum.wrapped("", 40, "  ") == ""


def test_a_body_cannot_imitate_a_heading():
    """Every line of a body is indented, also where it holds other line ends, so that it cannot pass for the next message."""
    for end in "\n\r\x0b\x0c\x1c\x85\u2028\u2029":
        shown = thrum.wrapped(f"text{end}● msg_01 @ada just now", 80, "  ")
        assert all(line.startswith("  ") for line in shown.splitlines()), hex(ord(end))


# ---------------------------------------------------------------- time

@pytest.mark.parametrize("seconds, expected", [
    (0, "0s"), (-5, "0s"), (45.9, "45s"), (59, "59s"), (60, "1m"), (300, "5m"), (3599, "59m"), (3600, "1h"), (7200, "2h"), (9000, "2h30m"),
    (86399, "23h59m"), (86400, "1d"), (3 * 86400, "3d"), (3 * 86400 + 5 * 3600 + 59 * 60, "3d5h")])
def test_span(seconds, expected):
    assert thrum.span(seconds) == expected


@pytest.mark.parametrize("seconds, expected", [
    (0, "just now"), (59.9, "just now"), (60, "1m ago"), (3599, "59m ago"), (3600, "1h ago"), (86399, "23h ago"), (86400, "1d ago"),
    (10 * 86400, "10d ago"), (-3600, "just now")])
def test_ago(seconds, expected):
    now = thrum.ns_of("2026-03-10T09:15:00Z")
    assert thrum.ago(thrum.stamp_of(now - int(seconds * NS)), now) == expected


def test_a_stamp_that_cannot_be_read():
    """What is not a stamp is shown as it is, harmless."""
    assert thrum.ago("yesterday", 0) == "yesterday"
    assert not raw_in(thrum.ago(POISON, 0)) and not raw_in(thrum.when(POISON))
    assert thrum.when("2026-03-10T09:17:00.123456789Z") == "2026-03-10 09:17:00" and thrum.when("") == ""


# ---------------------------------------------------------------- tables and names

def test_rows_of():
    """Columns are aligned, the last is not padded, no line ends in blanks that were not there."""
    assert thrum.rows_of([["a", "bb", "c"], ["aaa", "b", "cc"]]) == "a    bb  c\naaa  b   cc\n"
    assert thrum.rows_of([["one"]]) == "one\n" or thrum.rows_of([["one"]]) == "  one\n"
    assert thrum.rows_of([["é", "x"], ["日本", "y"]]).count("\n") == 2


@pytest.mark.parametrize("agent_id, expected", [
    ("ada", "@ada"), ("implementer_0123456789", "@implementer_0123456789"), ("agent:planner:ABCDEFGHJK", "@planner"),
    ("a\x1b[31m", "@a\\x1b[31m"), ("agent:r\x1b:x", "@r\\x1b:x"[:6])])
def test_handle(agent_id, expected):
    assert thrum.handle(agent_id) == expected


# ---------------------------------------------------------------- commands with text of others

WHEN = "2026-03-10T09:15:00.000000001Z"
STATES = [{"agent_id": POISON, "delivered_at": WHEN, "read_at": WHEN},
          {"agent_id": "b" + POISON, "delivered_at": WHEN, "pushed_at": WHEN, "route": POISON, "shown_at": WHEN, "seen_at": WHEN,
           "overdue": True},
          {"agent_id": "c" + POISON, "delivered_at": WHEN, "gone": True, "last_seen_at": WHEN, "host": POISON, "answer": POISON,
           "answered_at": WHEN}]
VIA = {"authored_by": POISON, "disclosed": True}
PAIRS = [{"type": POISON, "value": POISON}]
LISTED = {"message_id": "msg_1", "thread_id": POISON, "reply_to": POISON, "agent_id": POISON, "body": {"format": POISON, "content": POISON},
          "created_at": WHEN, "updated_at": WHEN, "deleted": True, "is_read": False, "seq": 1, "recipients": STATES, "audiences": PAIRS,
          "read_count": 1, **VIA}
MEMBERS = [{"member_type": POISON, "member_value": POISON, "added_at": WHEN, "added_by": POISON},
           {"member_type": "agent", "member_value": POISON, "added_at": WHEN},
           {"member_type": "role", "member_value": "*", "added_at": WHEN}]
ORPHAN = {"agent_id": POISON, "name": POISON, "role": POISON, "module": POISON, "worktree": POISON, "branch": POISON, "last_seen_at": WHEN,
          "worktree_missing": True, "branch_missing": False, "days_since_last_seen": 1, "reason": POISON, "message_count": 1}
PAGE = {"messages": [LISTED], "total": 1, "unread": 1, "page": 1, "page_size": 10, "total_pages": 1, "last_seq": 1, "epoch": "e"}
CHANGE = {"path": POISON, "last_modified": WHEN, "additions": 1, "deletions": 1, "status": POISON, "renamed_from": POISON}
CLAIM = {"claim_id": "clm_1", "path": POISON, "agent_id": POISON, "session_id": POISON, "shared": True, "note": POISON, "granted_at": WHEN,
         "expires_at": WHEN, "ttl_s": 60, "fence": "evt_1", "host": POISON, "holds": False}
CONFLICT = {"agents": [[POISON], [POISON]], "worktree_paths": [POISON, POISON], "branches": [POISON, POISON], "clean": False,
            "files": [{"path": POISON, "kind": POISON, "names": [POISON]},
                      {"path": POISON, "kind": "contents", "ranges": [[[1, 2]], [[3, 4]]]}]}
REPLIES = {         # what a daemon would say whose log came from somebody who means harm
    "health": {"status": "ok", "uptime_ms": 5, "version": POISON, "repo_id": POISON, "sync_state": POISON, "agents": 1, "messages": 1,
               "bad_lines": 1, "last_seq": 1, "epoch": "e", "pid": 1},
    "agent.list": {"agents": [{"agent_id": POISON, "kind": "agent", "role": POISON, "module": POISON, "display": POISON,
                               "registered_at": WHEN, "last_seen_at": POISON}]},
    "agent.whoami": {"agent_id": POISON, "role": POISON, "module": POISON, "display": POISON, "branch": POISON, "intent": POISON,
                     "session_id": POISON, "session_start": POISON, "source": "caller"},
    "session.list": {"sessions": [{"session_id": POISON, "agent_id": POISON, "started_at": WHEN, "ended_at": WHEN, "end_reason": POISON,
                                   "last_seen_at": WHEN, "intent": POISON, "status": "ended"}]},
    "agent.listContext": {"contexts": [{
        "session_id": POISON, "agent_id": POISON, "branch": POISON, "worktree_path": POISON, "intent": POISON, "intent_updated_at": POISON,
        "current_task": POISON, "task_updated_at": POISON, "git_updated_at": POISON, "uncommitted_files": [POISON],
        "changed_files": [POISON], "unmerged_commits": [{"sha": POISON, "message": POISON, "files": [POISON, POISON]}]}]},
    "team.list": {"members": [{
        "agent_id": POISON, "kind": "agent", "role": POISON, "module": POISON, "hostname": POISON, "worktree": POISON, "session_id": POISON,
        "session_start": WHEN, "last_seen": WHEN, "intent": POISON, "current_task": POISON, "branch": POISON, "git_updated_at": WHEN,
        "unmerged_commits": 1, "file_changes": [CHANGE], "uncommitted_files": [POISON], "claims": [POISON],
        "conflicts": [{"with": POISON, "files": [POISON]}], "inbox_total": 1, "inbox_unread": 1, "status": "active"}],
        "shared_messages": {"broadcast_total": 1, "groups": [{"name": POISON, "total": 1}]}},
    "work.whoHas": {"file": POISON, "claims": [CLAIM], "unattended": [{"worktree_path": POISON, "branch": POISON, "file_changes": [CHANGE],
                                                                      "agents": [POISON]}],
                    "contexts": [{"agent_id": POISON, "branch": POISON, "uncommitted_files": [POISON], "file_changes": [CHANGE],
                                  "live": False, "git_updated_at": WHEN, "hostname": POISON}]},
    "claim.list": {"claims": [CLAIM], "waiting": [{"agent_id": POISON, "paths": [POISON], "shared": True, "since": WHEN}]},
    "claim.take": {"claims": [CLAIM], "scope": "this machine"}, "claim.release": {"released": [CLAIM], "count": 1},
    "conflict.list": {"pairs": [CONFLICT], "base": [{**CONFLICT, "agents": [[POISON]], "worktree_paths": [POISON], "base": "0" * 40,
                                                    "base_branch": POISON}],
                      "skipped": [{"worktree_path": POISON, "paths": [POISON]}], "errors": [{"worktree_path": POISON, "error": POISON}],
                      "checked_at": WHEN},
    "worktree.status": {"branch": POISON, "uncommitted_files": [POISON], "uncommitted_total": 1, "unmerged_commits": 1},
    "group.list": {"groups": [{"group_id": "grp_1", "name": POISON, "description": POISON, "member_count": 1, "created_at": WHEN}]},
    "message.list": PAGE, "message.outbox": PAGE,
    "message.wait": {"messages": [LISTED], "after_seq": 1, "epoch": "e", "remaining": 0},
    "message.get": {"message": {"message_id": "msg_1", "thread_id": POISON, "author": {"agent_id": POISON, "session_id": POISON},
                                "body": {"format": POISON, "content": POISON}, "scopes": PAIRS, "refs": PAIRS, "created_at": WHEN,
                                "updated_at": WHEN, "metadata": {"deleted_at": WHEN, "delete_reason": POISON}, "deleted": True,
                                "audiences": PAIRS, "recipients": STATES, **VIA,
                                "history": [{"at": WHEN, "editor": POISON, "body": {"format": POISON, "content": POISON}}]}},
    "message.trace": {"message_id": POISON, "thread_id": POISON, "agent_id": POISON, "created_at": WHEN, "deleted": True, "seq": 1,
                      "content": POISON, "audiences": PAIRS, "recipients": STATES, **VIA},
    "message.search": {"messages": [{**LISTED, "snippet": POISON + "hit" + POISON, "hits": [[0, 3], [len(POISON), len(POISON) + 3]]}],
                       "total": 1, "complete": True, "query": POISON},
    "message.markShown": {"marked_count": 1, "pushed_count": 1},
    "purge.execute": {"before": WHEN, "dry_run": False, "messages_deleted": 1, "sessions_deleted": 1, "events_deleted": 1,
                      "sync_message_files": 1, "sync_events_filtered": 1},
    "agent.delete": {"agent_id": POISON, "deleted": True, "message": POISON},
    "agent.cleanup": {"orphans": [ORPHAN], "deleted": [POISON], "deleted_count": 1, "dry_run": False, "message": POISON},
    "group.info": {"group_id": POISON, "name": POISON, "description": POISON, "created_at": WHEN, "created_by": POISON, "members": MEMBERS},
    "group.members": {"name": POISON, "members": MEMBERS, "expanded": [POISON]},
    "group.member.remove": {"group": POISON, "member_type": "agent", "member_value": POISON, "member": POISON, "removed": True},
    "group.delete": {"name": POISON, "deleted_at": WHEN, "deleted": True},
    "message.send": {"message_id": "msg_2", "thread_id": POISON, "warnings": [POISON], "recipients": STATES, "audiences": PAIRS,
                     "resolved_to": 1, "created_at": WHEN},
    "message.markRead": {"marked_count": 1, "remaining": 0, "also_read_by": {"msg_1": [POISON]}},
    "group.member.add": {"group": POISON, "member_type": "agent", "member_value": POISON},
}
IDENTITY = json.dumps({"agent": {"Name": "ada", "Role": "planner", "Module": "core"}, "worktree": "w", "intent": POISON, "branch": POISON,
                       "session_id": POISON}).encode()


class Recorder(thrum.Console):
    """A console whose daemon gives canned answers and that keeps what would be printed."""

    def __init__(self, argv, replies=REPLIES, terminals="", **environ):
        super().__init__(thrum.World({}), top="/w", cwd="/w", argv=argv, environ=environ, identities=[("ada.json", IDENTITY)],
                         terminals=terminals)
        self.replies, self.streams = replies, {"O": "", "E": ""}

    async def call(self, method, **params):
        reply = self.replies[method]
        if isinstance(reply, Exception):
            raise reply
        return json.loads(json.dumps(reply))

    async def write(self, stream, text):
        self.streams[stream] += text

    async def read(self, path):
        return b"text"

    async def save(self, path, data):
        pass

    async def ask(self, question):
        if "0" not in self.terminals:
            return ""
        self.streams["O"] += thrum.plain(question)
        return "y"

    async def load(self, file):
        return POISON.encode(), 10 ** 18


def run(argv, **more):
    console = Recorder(argv, **more)
    status = asyncio.run(thrum.run_command(console, thrum.COMMANDS))
    return status, console.streams["O"], console.streams["E"]


SHOWING = ["status", "whoami", "agent list", "session list", "group list", "inbox", "inbox --all", "inbox --unread", "sent",
           "message get msg_1", "wait --unread", "send x", "reply msg_1 x", "group add g @x", "agent whoami", "message get msg_1 --history",
           "sent --overdue", "search x", "trace msg_1", "purge --all", "purge --before 2d --confirm", "agent delete x --force",
           "agent delete x", "agent cleanup", "agent cleanup --dry-run", "agent cleanup --force", "group info g", "group members g",
           "group members g --expand", "group remove g @x", "group delete g", "prime", "overview", f"ping {POISON.split()[0]}",
           "ping nobody\x1b", "agent context", "agent context x", "agent list --context", "context show", "context preamble",
           "team", "who-has x", "claim x", "release x", "claims", "conflicts"]


@pytest.mark.parametrize("words", ["agent delete x", "agent cleanup"])
def test_what_asks_shows_no_control_characters_raw(words):
    """The question too, and what comes after a yes."""
    replies = {**REPLIES, "agent.cleanup": {**REPLIES["agent.cleanup"], "deleted": []}}
    status, out, err = run(words.split(), replies=replies, terminals="0")
    assert (status, err) == (0, "") and "eleted " in out and not raw_in(out), raw_in(out)


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("words", SHOWING)
def test_no_command_shows_control_characters_raw(words, more):
    """Whatever stands in names, bodies, intents, roles, scopes, descriptions, reasons: neither stream gets it raw."""
    status, out, err = run(words.split() + more)
    assert status == 0, err
    assert out and not raw_in(out), raw_in(out)
    assert not raw_in(err), raw_in(err)
    if more:
        one_document(out)


def test_errors_of_others_are_harmless_too():
    """The words of an error may carry text of others; they stay one harmless line."""
    for text in (POISON, "two\nlines", "x" * 5_000):
        status, out, err = run(["inbox"], replies={**REPLIES, "message.list": thrum.ThrumError(text)})
        assert (status, out) == (1, "") and err.startswith("Error: ") and not raw_in(err)
        assert err.count("\n") == 1 and len(err) < 1_000, len(err)


def test_colour_only_on_a_terminal():
    assert "\x1b[1m" in run(["inbox", "--unread"], terminals="1")[1]
    for more in ({}, {"terminals": "02"}, {"terminals": "1", "NO_COLOR": "1"}):
        assert "\x1b" not in run(["inbox", "--unread"], **more)[1], more
    assert "\x1b" not in run(["inbox", "--unread", "--json"], terminals="1")[1], "a document has no colour"


def test_through_a_real_daemon(tmp_path):
    """The same from end to end: what @bob wrote with RPC is harmless in every answer that @ada gets."""
    team = Team(tmp_path)
    try:
        with team.bob.client() as client:
            session = client.call("agent.whoami", caller_agent_id="bob")["session_id"]
            client.call("session.setIntent", session_id=session, intent=POISON)
            client.call("session.setTask", session_id=session, current_task=POISON)
            client.call("group.create", name="evil", description=POISON, caller_agent_id="bob")
            sent = client.call("message.send", content=POISON, mentions=["@ada"], caller_agent_id="bob", structured={"k": POISON})
            for field in ("scopes", "refs"):
                with pytest.raises(thrum.InvalidParams):
                    client.call("message.send", content="x", caller_agent_id="bob", **{field: PAIRS})
            for name in ("display", "module", "name", "role"):
                with pytest.raises(thrum.ThrumError):
                    client.call("agent.register", **{"role": "r", "module": "m", "name": "n", name: POISON})
            gone = client.call("message.send", content="gone", mentions=["@ada"], caller_agent_id="bob")["message_id"]
            client.call("message.delete", message_id=gone, reason=POISON, caller_agent_id="bob")
            client.call("session.end", session_id=session, reason="x\x1b[2J")
        for words in ("inbox --unread", "agent list", "session list", "group list", "status", f"message get {sent['message_id']}",
                      f"message get {gone}", "wait --after-seq 0 --all", "daemon logs"):
            for more in ([], ["--json"]):
                done = team.ada.run(*words.split(), *more, check=0)
                assert not raw_in(done.stdout) and not raw_in(done.stderr), (words, raw_in(done.stdout))
        assert "\\x1b" in team.ada.ok("inbox"), "shown, not swallowed"
        error_line(team.ada.run("message", "get", POISON))
    finally:
        team.close()


# ---------------------------------------------------------------- the parser

def parsed(name, *words):
    return vars(thrum.parse_command(ROWS[name], list(words)))


def test_values_and_defaults():
    values = parsed("inbox")
    assert (values["unread"], values["page_size"], values["limit"], values["scope"], values["from_"]) == (False, 10, None, None, None)
    values = parsed("inbox", "--unread", "--limit=5", "--page", "+2", "--from", "@x", "-a", "--scope=a:b=c")
    assert (values["unread"], values["limit"], values["page"], values["all"]) == (True, 5, 2, True)
    assert (values["from_"], values["scope"]) == ("@x", "a:b=c")
    values = parsed("wait", "--after", "-30s", "--timeout=1h30m")
    assert (values["after"], values["timeout"]) == (-30.0, 5400.0)
    values = parsed("send", "text", "--to", "--json")
    assert (values["message"], values["to"], values["json"]) == ("text", "--json", False)
    values = parsed("send", "--mention", "a,b", "--mention=c", "--", "-x")
    assert (values["mention"], values["message"]) == (["a", "b", "c"], "-x")
    assert parsed("send", "-")["message"] == "-" and parsed("send", "")["message"] == ""
    assert parsed("message read", "a", "b", "--all")["msg_id"] == ["a", "b"]
    assert parsed("session set-intent", "")["text"] == ""
    assert parsed("inbox", "ignored", "words")["unread"] is False
    assert parsed("inbox", "--unread=false")["unread"] is False and parsed("inbox", "--unread=true")["unread"] is True
    assert parsed("inbox", "--limit", "1", "--limit", "2")["limit"] == 2
    assert parsed("send", "--help")["help"] is True and parsed("message get", "-h")["help"] is True


@pytest.mark.parametrize("name, words, text", [
    ("inbox", ["--nope"], "unknown flag: --nope"), ("inbox", ["--unrea"], "unknown flag: --unrea"),
    ("inbox", ["--nope=5"], "unknown flag: --nope"), ("inbox", ["-p"], "unknown shorthand flag: 'p' in -p"),
    ("inbox", ["-pq"], "unknown shorthand flag: 'p' in -pq"), ("send", ["-1"], "unknown shorthand flag: '1' in -1"),
    ("inbox", ["--limit"], "flag needs an argument: --limit"), ("inbox", ["--limit", "x"], 'invalid argument "x" for "--limit" flag: '),
    ("inbox", ["--limit", "1.5"], 'invalid argument "1.5" for "--limit" flag: '),
    ("inbox", ["--limit="], 'invalid argument "" for "--limit" flag: '),
    ("inbox", ["--limit", "9" * 30], 'invalid argument "'), ("inbox", ["--limit", "٣"], 'invalid argument "٣" for "--limit" flag: '),
    ("inbox", ["--json=x"], 'invalid argument "x" for "--json" flag: '), ("message get", [], "accepts 1 arg(s), received 0"),
    ("message get", ["a", "b"], "accepts 1 arg(s), received 2"), ("group add", [], "accepts between 1 and 2 arg(s), received 0"),
    ("group add", ["a", "b", "c"], "accepts between 1 and 2 arg(s), received 3"), ("send", ["a", "b"], "accepts 1 arg(s), received 2"),
    ("reply", ["a", "b", "c"], "accepts 2 arg(s), received 3"), ("wait", ["--timeout", "30"], "invalid timeout: "),
    ("wait", ["--after", "soon"], 'invalid --after duration "soon": '), ("wait", ["--timeout", ""], "invalid timeout: ")])
def test_parse_errors(name, words, text):
    """The texts of the contract (1.3), each exactly or with more behind it."""
    with pytest.raises(thrum.Usage) as caught:
        parsed(name, *words)
    assert str(caught.value).startswith(text), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv, name, rest", [
    ([], "", []), (["inbox"], "inbox", []), (["inbox", "--unread"], "inbox", ["--unread"]),
    (["--json", "inbox"], "inbox", ["--json"]), (["--repo", "inbox", "sent"], "sent", ["--repo", "inbox"]),
    (["--repo=x", "message", "--json", "get", "id"], "message get", ["--repo=x", "--json", "id"]),
    (["message"], "message", []), (["message", "nope"], "message", ["nope"]), (["sent", "show", "x"], "sent show", ["x"]),
    (["sent", "shown"], "sent", ["shown"]), (["nope"], "", ["nope"]), (["send", "inbox"], "send", ["inbox"]), (["send", ""], "send", [""]),
    (["", "inbox"], "", ["", "inbox"]), (["send", "--to", "inbox", "x"], "send", ["--to", "inbox", "x"]),
    (["session", "set-intent", ""], "session set-intent", [""]), (["--role"], "", ["--role"]),
    (["send", "--", "inbox"], "send", ["--", "inbox"]),
    (["group", "add", "--role", "x", "g"], "group add", ["--role", "x", "g"])])
def test_split_command(argv, name, rest):
    """The command's name and the other words, in order; global flags may stand before and between."""
    assert thrum.split_command(argv, ROWS) == (name, rest)


def test_order_does_not_matter():
    """Any mixture of flags and words comes out the same in any order (flags and positionals may be mixed)."""
    import itertools
    pieces = [["--to", "@bob"], ["--json"], ["text"], ["--scope", "a:b"]]
    results = {json.dumps(parsed("send", *itertools.chain(*order)), sort_keys=True) for order in itertools.permutations(pieces)}
    assert len(results) == 1
