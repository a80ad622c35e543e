"""What every method takes and gives: parameters, errors, result shapes, routing, paging, waiting.

Most run in this process on a ledger in a temporary directory; what only a daemon does (waiting, dispatch) has one.
"""

import json
import threading

import pytest

import thrum
from conftest import FakeWorld

LONG = 30           # seconds after which a thread that should be done has failed


class Team:
    """A ledger with the methods on it, called as the daemon calls them."""

    def __init__(self, top, world=None):
        self.world = world or FakeWorld()
        (top / ".thrum" / "identities").mkdir(parents=True)
        (top / ".git" / "thrum-sync" / "a-sync" / "messages").mkdir(parents=True)
        self.places = thrum.Places(str(top), str(top / ".thrum"), str(top / ".git"))
        self.open()

    def open(self):
        self.ledger = thrum.Ledger(self.places, self.world)
        self.ledger.facts.update(started=self.world.monotonic(), stop=lambda: None, port=9999,      # as the daemon does
                                 link=lambda: "http://localhost:9999/")
        self.ledger.open("r_0123456789AB")
        self.reading = thrum.Store(self.places.database, self.world)

    def close(self):
        self.reading.close()
        self.ledger.close()

    def call(self, method, **params):
        self.world.at += thrum.NS
        row = thrum.METHODS[method]
        checked = thrum.check_params(row, params)
        if row.writes:
            (outcome,), self.events = self.ledger.commit([lambda context: row.handler(context, checked)])
            if isinstance(outcome, Exception):
                raise outcome
            return json.loads(json.dumps(outcome))
        if row.indexes:         # as the daemon does before it asks
            while self.ledger.commit([lambda context: context.store.index_messages(2)])[0][0]:
                pass
        context = thrum.Context(self.world, self.reading, self.ledger)
        return json.loads(json.dumps(self.reading.within(10, lambda: row.handler(context, checked))))

    def refused(self, method, **params):
        """The text with which a call is refused; it must leave nothing behind."""
        before = self.ledger.journal.last, self.ledger.journal.size
        with pytest.raises(thrum.ThrumError) as caught:
            self.call(method, **params)
        assert (self.ledger.journal.last, self.ledger.journal.size) == before
        assert "\n" not in str(caught.value)
        return caught.value

    def agent(self, name, role, module="core", session=True, **more):
        """Register an agent; gives the id of its session."""
        assert self.call("agent.register", name=name, role=role, module=module, force=True, **more)["status"] == "registered"
        return self.call("session.start", agent_id=name)["session_id"] if session else ""

    def person(self, name, **more):
        """Register a person with a session; gives its id."""
        user = self.call("user.register", username=name, **more)["user_id"]
        self.call("session.start", agent_id=user)
        return user

    def send(self, who, content="hello", **more):
        return self.call("message.send", caller_agent_id=who, content=content, **more)

    def get(self, message_id):
        return self.call("message.get", message_id=message_id)["message"]

    def inbox(self, who, **more):
        """The texts in an inbox, in the order of the page."""
        return [m["body"]["content"] for m in self.call("message.list", for_agent=who, caller_agent_id=who, **more)["messages"]]


@pytest.fixture
def team(tmp_path):
    made = Team(tmp_path)
    yield made
    made.close()


@pytest.fixture
def abc(team):
    """The acceptance vectors' team: a with role x, b and c with role y, all with sessions."""
    team.sessions = {"a": team.agent("a", "x"), "b": team.agent("b", "y"), "c": team.agent("c", "y")}
    return team


# ---- parameters, for every method

# A call that is right for each method, on the team of `rich`; what is not here has no test and fails below.
RIGHT = {
    "health": {},
    "daemon.stop": {},
    "page.link": {},
    "agent.register": {"role": "x", "module": "new", "name": "newcomer", "display": "New", "force": True, "re_register": True,
                       "worktree": "repo", "dry_run": False},
    "agent.delete": {"name": "c", "caller_agent_id": "a"},
    "agent.cleanup": {"dry_run": True, "force": False, "threshold": 3, "caller_agent_id": "a"},
    "user.register": {"username": "leon", "display": "Leon"},
    "user.identify": {},
    "agent.list": {"role": "x", "module": "core"},
    "agent.whoami": {"caller_agent_id": "a"},
    "agent.listContext": {"agent_id": "a", "role": "x", "branch": "main", "file": "a.py", "fresh": False},
    "team.list": {"include_offline": True},
    "work.whoHas": {"file": "src/a.py"},
    "conflict.list": {"agents": [], "all": True},
    "worktree.status": {"repo_path": "TOP"},
    "context.save": {"agent_name": "a", "content": "bm90ZXM=", "text": False, "repo_path": "TOP", "caller_agent_id": "a"},
    "context.show": {"agent_name": "a", "include_preamble": True, "no_preamble": False, "text": True, "repo_path": "TOP",
                     "caller_agent_id": "a"},
    "context.clear": {"agent_name": "a", "text": True, "repo_path": "TOP", "caller_agent_id": "a"},
    "context.preamble.show": {"agent_name": "a", "text": True, "repo_path": "TOP", "caller_agent_id": "a"},
    "context.preamble.save": {"agent_name": "a", "content": "notes", "text": True, "repo_path": "TOP", "caller_agent_id": "a"},
    "session.start": {"agent_id": "a", "scopes": [{"type": "module", "value": "m"}], "refs": [{"type": "pr", "value": "1"}]},
    "session.end": {"session_id": "SESSION", "reason": "done"},
    "session.list": {"agent_id": "a", "active_only": True},
    "session.thread": {"caller_agent_id": "ada"},
    "session.heartbeat": {"session_id": "SESSION", "add_scopes": [{"type": "t", "value": "v"}],
                          "remove_scopes": [{"type": "t", "value": "w"}], "add_refs": [{"type": "t", "value": "v"}],
                          "remove_refs": [{"type": "t", "value": "w"}]},
    "session.setIntent": {"session_id": "SESSION", "intent": "think"},
    "session.setTask": {"session_id": "SESSION", "current_task": "t-1"},
    "claim.take": {"paths": ["src", "*.md"], "ttl_s": 60, "note": "parser", "shared": True, "wait_ms": 0,
                   "queued_at": "2026-03-10T09:00:00Z", "confirm": True, "caller_agent_id": "a"},
    "claim.release": {"paths": [], "caller_agent_id": "a"},
    "claim.list": {"paths": ["src"], "agent_id": "a"},
    "claim.check": {"paths": ["src/a.py"], "caller_agent_id": "b"},
    "group.create": {"name": "g2", "description": "two", "caller_agent_id": "a"},
    "group.member.add": {"group": "g", "member_type": "agent", "member_value": "c", "caller_agent_id": "a"},
    "group.member.remove": {"group": "g", "member_type": "agent", "member_value": "c", "caller_agent_id": "a"},
    "group.delete": {"name": "g", "delete_messages": True, "caller_agent_id": "a"},
    "group.info": {"name": "g"},
    "group.members": {"name": "g", "expand": True},
    "group.list": {},
    "message.send": {"content": "x", "format": "plain", "structured": {"k": 1}, "reply_to": "MESSAGE", "thread_id": "THREAD",
                     "scopes": [{"type": "s", "value": "v"}], "refs": [{"type": "r", "value": "v"}], "mentions": ["@b"],
                     "tags": ["t"], "send_key": "k", "if_last": "MESSAGE", "acting_as": "a", "disclose": True,
                     "caller_agent_id": "user:leon"},
    "message.get": {"message_id": "MESSAGE", "history": True},
    "message.trace": {"message_id": "MESSAGE"},
    "message.search": {"query": "first", "from": "@a", "to": "@b", "thread_id": "THREAD", "scope": {"type": "s", "value": "v"},
                       "created_after": "2026-01-01T00:00:00Z", "limit": 5},
    "message.archive": {"archive_type": "group", "identifier": "g", "caller_agent_id": "a"},
    "message.deleteByScope": {"scope_type": "nobody", "scope_value": "has", "caller_agent_id": "a"},
    "message.deleteByAgent": {"agent_id": "c", "caller_agent_id": "a"},
    "message.markShown": {"message_ids": ["MESSAGE"], "route": "test", "pushed": False, "caller_agent_id": "b"},
    "purge.execute": {"before": "2026-01-01T00:00:00Z", "dry_run": False},
    "message.list": {"scope": {"type": "s", "value": "v"}, "ref": {"type": "r", "value": "v"}, "thread_id": "THREAD",
                     "author_id": "a", "mentions": True, "mention_role": "b", "caller_mention_role": "y", "unread": True,
                     "unread_for_agent": "b", "exclude_self": True, "for_agent": "b", "for_agent_role": "y",
                     "created_after": "2026-01-01T00:00:00Z", "after_seq": 0, "epoch": "EPOCH",
                     "sort_by": "created_at", "sort_order": "asc", "audiences": True,
                     "page_size": 5, "page": 1, "caller_agent_id": "b"},
    "message.outbox": {"to": "@b", "unread": True, "overdue": False, "page_size": 5, "page": 1, "caller_agent_id": "a"},
    "message.edit": {"message_id": "MESSAGE", "content": "new", "structured": {"k": 2}, "caller_agent_id": "a"},
    "message.delete": {"message_id": "MESSAGE", "reason": "why", "caller_agent_id": "a"},
    "message.markRead": {"message_ids": ["MESSAGE"], "all": False, "up_to_seq": 9, "caller_agent_id": "b"},
    "message.wait": {"after_seq": 0, "epoch": "EPOCH", "created_after": "2026-01-01T00:00:00Z", "timeout_ms": 1, "all": False,
                     "unread": False, "from": "a", "thread_id": "THREAD", "scope": {"type": "s", "value": "v"},
                     "mention_role": "b", "page_size": 5, "caller_agent_id": "b"},
    "subscribe": {"scope": {"type": "s", "value": "v"}, "mention_role": "b", "all": False, "topics": ["claims"], "caller_agent_id": "a"},
    "event.wait": {"after_seq": 0, "epoch": "EPOCH", "created_after": "2026-01-01T00:00:00Z", "topics": ["messages", "claims"], "from": "a",
                   "to": "b", "scope": {"type": "s", "value": "v"}, "limit": 5, "timeout_ms": 1, "caller_agent_id": "b"},
    "unsubscribe": {"subscription_id": 1, "caller_agent_id": "a"},
    "subscriptions.list": {"caller_agent_id": "a"},
    "task.report": {"task_id": "t", "thread_id": "THREAD", "stream_type": "tool_use", "turn_num": 1, "text": "x", "tool_name": "Bash",
                    "tool_input": "ls", "tool_output": "a", "error_msg": "e", "status": "running", "tokens_in": 1, "tokens_out": 2,
                    "cost": 0.5, "duration_sec": 3, "workspace": "/w", "directive": "d", "directive_full": "dd", "agent_id": "a",
                    "source_type": "direct", "caller_agent_id": "a"},
    "task.list": {"limit": 5},
    "task.events": {"task_id": "t", "limit": 5, "turn": 1, "type": "text", "format": "json"},
    "telemetry.report": {"instance_id": "a", "pid": 1, "turns": 1, "tokens_in": 1, "tokens_out": 1, "cost": 1, "status": "running",
                         "duration_sec": 1, "caller_agent_id": "a"},
    "telemetry.list": {"limit": 5},
}
WRONG = {
    str: [0, 1, False, True, [], ["x"], {}, {"a": 1}, 1.5],
    int: ["1", "", False, True, 1.5, [], {}],
    float: ["1", "", False, True, [], {}],
    bool: [0, 1, "true", "", [], {}],
    dict: [0, "x", "", False, True, [], [{}]],
    thrum.PAIR: [0, "a:b", "", True, [], {}, {"type": "a"}, {"type": "a", "value": 1}, {"type": "", "value": "v"},
                 {"type": "a", "value": "line\nfeed"}, {"type": "a", "value": "v" * 257}],
}
FIELDS = [(name, field) for name, row in thrum.METHODS.items() for field in row.params]


@pytest.fixture
def rich(abc):
    """`abc` with a group, a thread and a person; `right(method)` are parameters that fit it."""
    abc.call("group.create", name="g")
    abc.person("leon")
    sent = abc.send("a", "first", mentions=["@b"], scopes=[{"type": "s", "value": "v"}], refs=[{"type": "r", "value": "v"}])
    known = {"SESSION": abc.sessions["a"], "MESSAGE": sent["message_id"], "THREAD": "thr_" + sent["message_id"][4:],
             "EPOCH": abc.ledger.journal.epoch, "TOP": abc.places.root}
    abc.call("task.report", task_id="t", stream_type="turn_start", turn_num=1)

    def right(method):
        return json.loads(json.dumps(RIGHT[method]), object_hook=lambda d: {
            k: known.get(v, v) if isinstance(v, str) else [known.get(i, i) if isinstance(i, str) else i for i in v]
            if isinstance(v, list) else v for k, v in d.items()})

    abc.right = right
    return abc


def test_the_table_of_right_calls_knows_every_method_and_field():
    assert set(RIGHT) == set(thrum.METHODS)
    for name, row in thrum.METHODS.items():
        assert set(RIGHT[name]) == {field.rstrip("!") for field in row.params}, name
        assert row.help.endswith(".") and callable(row.handler), name


@pytest.mark.parametrize("method", list(thrum.METHODS))
def test_a_right_call_succeeds_and_null_means_absent(rich, method):
    rich.call(method, **rich.right(method))
    row = thrum.METHODS[method]
    needed = {field.rstrip("!") for field in row.params if field.endswith("!")}
    assert thrum.check_params(row, {f.rstrip("!"): None for f in row.params if f.rstrip("!") not in needed} |
                              {f: RIGHT[method][f] for f in needed}) == {f: RIGHT[method][f] for f in needed}


def test_unknown_fields_are_ignored_and_null_params_are_none_at_all(team):
    assert thrum.check_params(thrum.METHODS["agent.list"], None) == {}
    assert team.call("agent.list", nobody_knows="this") == {"agents": []}


@pytest.mark.parametrize("method", list(thrum.METHODS))
@pytest.mark.parametrize("params", [[], [1], "text", 1, True])
def test_params_that_are_no_object_are_invalid(method, params):
    with pytest.raises(thrum.InvalidParams) as caught:
        thrum.check_params(thrum.METHODS[method], params)
    assert caught.value.code == -32602


@pytest.mark.parametrize(("method", "field"), FIELDS)
def test_a_wrong_type_is_invalid_and_names_the_field(method, field):
    """-32602 for every value of another type, falsy ones too, in required and optional fields alike."""
    row, name = thrum.METHODS[method], field.rstrip("!")
    kind = row.params[field]
    if isinstance(kind, list):
        wrong = [0, False, True, "", "x", {}] + [[value] for value in WRONG[kind[0]]]
    else:
        wrong = WRONG[kind]
    for value in wrong:
        with pytest.raises(thrum.ThrumError) as caught:
            thrum.check_params(row, {**RIGHT[method], name: value})
        assert (caught.value.code, name in str(caught.value)) == (-32602, True), f"{name} = {value!r}: {caught.value}"


@pytest.mark.parametrize(("method", "field"), [(m, f) for m, f in FIELDS if f.endswith("!")])
def test_a_missing_or_empty_required_field_is_named(method, field):
    """As scripts know it: `content is required`, missing, null and empty alike."""
    name = field.rstrip("!")
    for params in ({}, {name: None}, {name: ""})[:2 if isinstance(RIGHT[method][name], list) else 3]:
        with pytest.raises(thrum.ThrumError) as caught:
            thrum.check_params(thrum.METHODS[method], {k: v for k, v in RIGHT[method].items() if k != name} | params)
        assert f"{name} is required" in str(caught.value)


def test_a_list_has_a_limit():
    row = thrum.METHODS["message.send"]
    with pytest.raises(thrum.InvalidParams, match="mentions"):
        thrum.check_params(row, {"content": "x", "mentions": ["@b"] * (thrum.LIST_MAX + 1)})


@pytest.mark.parametrize(("method", "field"), [(m, f) for m, f in FIELDS if thrum.METHODS[m].params[f] is int])
def test_no_number_is_an_internal_error(rich, method, field):
    """Numbers that no column holds are clamped or refused by name."""
    for value in (-1, 0, 2**31, 2**63 - 1, 2**63, 2**64, -2**63 - 1, 10**30):
        try:
            rich.call(method, **{**rich.right(method), field: value})
        except thrum.ThrumError as error:
            assert error.code in (-32602, -32000) and field in str(error), f"{value}: {error}"


@pytest.mark.parametrize("method", ["message.list", "message.wait", "message.search", "event.wait"])
def test_no_time_is_an_internal_error(rich, method):
    for stamp in ("1970-01-01T00:00:00Z", "2262-04-12T00:00:00Z", "9999-12-31T23:59:59.999999999Z"):
        try:
            rich.call(method, query="x", caller_agent_id="b", created_after=stamp)
        except thrum.ThrumError as error:
            assert error.code == -32602 and "created_after" in str(error), stamp


@pytest.mark.parametrize("method", ["message.list", "message.wait", "message.search", "event.wait"])
def test_a_time_that_is_none_is_refused(rich, method):
    for stamp in ("yesterday", "2026-03-10", "2026-13-10T00:00:00Z", "2026-03-10T09:15:00", "-30s"):
        error = rich.refused(method, query="x", caller_agent_id="b", created_after=stamp)
        assert error.code == -32602 and "created_after" in str(error), stamp


@pytest.mark.parametrize(("method", "field"), [
    ("message.send", "content"), ("message.send", "send_key"), ("message.send", "tags"), ("message.send", "mentions"),
    ("message.edit", "content"), ("message.delete", "reason"), ("session.setIntent", "intent"), ("session.setTask", "current_task"),
    ("session.end", "reason"), ("agent.register", "display"), ("agent.register", "module"), ("group.create", "description"),
    ("agent.list", "role"), ("message.list", "author_id"), ("user.register", "display"), ("user.register", "username"),
    ("agent.delete", "name"), ("group.delete", "name"), ("group.info", "name"), ("message.send", "acting_as"),
    ("message.send", "if_last"), ("message.search", "query"), ("message.search", "from"), ("message.search", "to"),
    ("message.archive", "identifier"), ("message.deleteByScope", "scope_value"), ("message.deleteByAgent", "agent_id"),
    ("message.markShown", "route"), ("purge.execute", "before")])
def test_text_that_is_not_unicode_is_refused_by_name(rich, method, field):
    params = rich.right(method)
    for text in ("\ud800", "a\udfffb", "a\0b"):
        error = rich.refused(method, **{**params, field: [text] if isinstance(params[field], list) else text})
        assert error.code == -32602 and field.rstrip("s") in str(error), text


@pytest.mark.parametrize("method", ["message.send", "message.edit"])
def test_a_structured_payload_that_no_log_can_hold_is_refused(rich, method):
    """json.loads makes such values of "\\ud800" and of 1e400; they must not end in an internal error."""
    for value in ({"a": "\ud800"}, {"\udc00": 1}, {"a": [{"b": "x\udfff"}]}, {"a": float("inf")}, {"a": float("nan")}):
        error = rich.refused(method, **{**rich.right(method), "structured": value})
        assert error.code in (-32602, -32000) and "structured" in str(error), value


# ---- health, agents, sessions

def test_health_has_the_references_fields_and_the_journals_numbers(abc):
    health = abc.call("health")
    assert {"status", "uptime_ms", "version", "repo_id", "sync_state"} <= set(health)
    assert (health["status"], health["repo_id"], health["sync_state"]) == ("ok", "r_0123456789AB", "ok")
    assert health["version"] == thrum.__version__
    assert (health["epoch"], health["last_seq"]) == (abc.ledger.journal.epoch, abc.ledger.journal.last)
    assert (health["agents"], health["sessions"], health["messages"]) == (3, 3, 0)


def test_register_gives_the_name_and_makes_role_and_everyone_reachable(team):
    """Vector 7; the role group is derived (decision 3), so it shows in what @x reaches."""
    assert team.call("agent.register", name="a", role="x", module="m") == {"agent_id": "a", "status": "registered"}
    assert "everyone" in [group["name"] for group in team.call("group.list")["groups"]]
    team.agent("b", "y")
    assert [r["agent_id"] for r in team.send("b", mentions=["@x"])["recipients"]] == ["a"]


def test_register_without_a_name_makes_an_id_of_role_and_hash(team):
    first = team.call("agent.register", role="tester", module="m")
    assert first["agent_id"] == thrum.unnamed_agent_id("r_0123456789AB", "tester", "m")
    assert first["agent_id"].startswith("tester_") and len(first["agent_id"]) == len("tester_") + 10
    assert team.call("agent.register", role="tester", module="m") == first


def test_register_reports_who_holds_role_and_module(team):
    """Vector 8: a success whose status is `conflict`; nothing is stored."""
    team.call("agent.register", name="a", role="x", module="m")
    before = team.ledger.journal.last
    answer = team.call("agent.register", name="b", role="x", module="m")
    assert answer["status"] == "conflict" and answer["agent_id"] == "" and team.ledger.journal.last == before
    assert answer["conflict"]["existing_agent_id"] == "a"
    assert set(answer["conflict"]) == {"existing_agent_id", "registered_at", "last_seen_at"}
    for way in ("force", "re_register"):
        assert team.call("agent.register", name="b_" + way, role="x", module="m", **{way: True})["status"] in ("registered", "updated")
    assert {row["agent_id"] for row in team.call("agent.list")["agents"]} == {"a", "b_force", "b_re_register"}, "nobody is deleted"


def test_a_dry_registration_answers_as_the_real_one_would(team):
    assert thrum.METHODS["agent.register"].preview == "dry_run"
    params = {"name": "a", "role": "x", "module": "m"}
    assert team.call("agent.register", **params, dry_run=True) == {"agent_id": "a", "status": "registered"}
    assert team.call("agent.list")["agents"] == []
    team.call("agent.register", **params)
    assert team.call("agent.register", **{**params, "name": "b"}, dry_run=True)["status"] == "conflict"
    assert team.call("agent.register", **params, re_register=True, dry_run=True)["status"] == "updated"
    refused = [str(team.refused("agent.register", name="x", role="y", module="m", dry_run=dry)) for dry in (True, False)]
    assert refused[0] == refused[1] and "conflicts with existing role 'x'" in refused[0]


def test_register_again_writes_nothing_and_re_register_says_updated(team):
    team.call("agent.register", name="a", role="x", module="m")
    before = team.ledger.journal.last
    assert team.call("agent.register", name="a", role="x", module="m")["status"] == "registered"
    assert team.ledger.journal.last == before
    assert team.call("agent.register", name="a", role="x", module="m", re_register=True)["status"] == "updated"
    assert team.ledger.journal.last == before + 1


@pytest.mark.parametrize(("params", "text"), [
    ({"name": "x", "role": "y", "module": "z"}, "agent name \"x\" conflicts with existing role 'x'"),              # vector 9
    ({"name": "y2", "role": "a", "module": "z"}, "role \"a\" conflicts with existing agent name 'a'"),             # vector 10
    ({"name": "z", "role": "z", "module": "z"}, 'agent name "z" cannot be the same as its role'),
    ({"name": "everyone", "role": "z", "module": "z"}, "everyone"),
    ({"name": "g", "role": "z", "module": "z"}, "there is a group of that name"),
    ({"name": "daemon", "role": "z", "module": "z"}, "invalid agent name: "),
    ({"name": "Upper", "role": "z", "module": "z"}, "invalid agent name: "),
    ({"name": "../x", "role": "z", "module": "z"}, "invalid agent name: "),
    ({"name": "user_x", "role": "z", "module": "z"}, "invalid agent name: "),
    ({"name": "a" * 65, "role": "z", "module": "z"}, "invalid agent name: "),
    ({"name": "n", "role": "../r", "module": "z"}, "role"),
    ({"name": "n", "role": "r r", "module": "z"}, "role"),
    ({"name": "n", "role": "r", "module": "z\nz"}, "module"),
])
def test_register_refuses_what_would_confuse(team, params, text):
    team.call("agent.register", name="a", role="x", module="m")
    team.call("group.create", name="g")
    assert text in str(team.refused("agent.register", **params))


def test_a_name_of_another_daemon_is_taken_only_by_force(team):
    """Decision 7: within 24 hours a conflict that names host and time."""
    team.call("agent.register", name="a", role="x", module="m")
    team.reading.close()
    team.ledger.close()
    path = team.places.var + "/daemon.json"
    with open(path) as file:
        ids = json.load(file)
    with open(path, "w") as file:
        json.dump({**ids, "daemon_id": "d_elsewhere000"}, file)
    team.open()
    error = team.refused("agent.register", name="a", role="x", module="m")
    assert team.world.hostname() in str(error) and "--force" in str(error)
    assert team.call("agent.register", name="a", role="x", module="m", force=True)["status"] == "registered"
    assert team.call("agent.register", name="a", role="x", module="m")["status"] == "registered", "now it is ours"


def test_agent_list_has_the_references_shape_and_filters(abc):
    agents = abc.call("agent.list")["agents"]
    assert [a["agent_id"] for a in agents] == ["c", "b", "a"], "the newest registration first"
    for agent in agents:
        assert {"agent_id", "kind", "role", "module", "display", "registered_at"} <= set(agent) <= {
            "agent_id", "kind", "role", "module", "display", "registered_at", "last_seen_at"}
        assert agent["kind"] == "agent"
    assert [a["agent_id"] for a in abc.call("agent.list", role="x")["agents"]] == ["a"]
    assert abc.call("agent.list", role="x", module="other")["agents"] == []


def test_whoami_knows_session_and_intent_and_does_not_invent(abc):
    abc.call("session.setIntent", session_id=abc.sessions["a"], intent="parse")
    who = abc.call("agent.whoami", caller_agent_id="a")
    assert (who["agent_id"], who["role"], who["module"], who["source"]) == ("a", "x", "core", "caller")
    assert (who["session_id"], who["intent"]) == (abc.sessions["a"], "parse") and thrum.ns_of(who["session_start"])
    stranger = abc.call("agent.whoami", caller_agent_id="stranger")
    assert (stranger["role"], stranger["module"], stranger["display"]) == ("", "", "") and "session_id" not in stranger


def test_without_a_caller_the_identity_of_the_daemons_worktree_counts(abc):
    with pytest.raises(thrum.NoIdentity):
        abc.call("agent.whoami")
    identity = thrum.Identity(name="b", role="y", module="core")
    with open(abc.places.identities + "/b.json", "wb") as file:
        file.write(thrum.render_identity(identity, "2026-03-10T09:15:00Z"))
    who = abc.call("agent.whoami")
    assert (who["agent_id"], who["source"], who["session_id"]) == ("b", "identity_file", abc.sessions["b"])
    assert abc.call("message.send", content="from b", mentions=["@a"])["message_id"]
    assert abc.call("message.list", for_agent="a")["messages"][0]["agent_id"] == "b"


def test_session_start_ends_what_a_crash_left_open(abc):
    again = abc.call("session.start", agent_id="a")
    assert set(again) == {"session_id", "agent_id", "started_at"} and again["session_id"] != abc.sessions["a"]
    sessions = {s["session_id"]: s for s in abc.call("session.list", agent_id="a")["sessions"]}
    assert sessions[abc.sessions["a"]]["end_reason"] == "crash_recovered" and sessions[abc.sessions["a"]]["status"] == "ended"
    assert sessions[again["session_id"]]["status"] == "active" and "ended_at" not in sessions[again["session_id"]]
    assert [s["session_id"] for s in abc.call("session.list", agent_id="a", active_only=True)["sessions"]] == [again["session_id"]]
    assert abc.call("session.list", agent_id="a", active=True) == abc.call("session.list", agent_id="a", active_only=True)
    assert str(abc.refused("session.start", agent_id="ghost")) == "agent not found: agent ghost not registered"


def test_session_end_answers_and_refuses_the_second_time(abc):
    done = abc.call("session.end", session_id=abc.sessions["a"], reason="lunch")
    assert set(done) == {"session_id", "ended_at", "duration_ms"} and done["duration_ms"] > 0
    assert abc.call("session.list", agent_id="a")["sessions"][0]["end_reason"] == "lunch"
    assert "already ended" in str(abc.refused("session.end", session_id=abc.sessions["a"]))
    assert "not found" in str(abc.refused("session.end", session_id="ses_nope"))
    # vector 11
    assert str(abc.refused("message.send", caller_agent_id="a", content="x")) == (
        "resolve agent and session: no active session found for agent a (you must start a session first)")


def test_heartbeat_removes_before_it_adds_and_causes_no_event_by_itself(abc):
    session, tick = abc.sessions["a"], {"type": "module", "value": "lexer"}
    before = abc.ledger.journal.last
    done = abc.call("session.heartbeat", session_id=session)
    assert {"session_id", "last_seen_at"} <= set(done) and abc.ledger.journal.last == before
    assert thrum.ns_of(done["last_seen_at"]) == abc.world.at
    abc.call("session.heartbeat", session_id=session, add_scopes=[tick], remove_scopes=[tick], add_refs=[{"type": "pr", "value": "7"}])
    assert abc.ledger.store.session_pairs(session) == ([("module", "lexer")], [("pr", "7")])
    abc.call("session.heartbeat", session_id=session, remove_scopes=[tick])
    assert abc.ledger.store.session_pairs(session) == ([], [("pr", "7")])
    for session_id, text in (("ses_nope", "session not found"), (abc.sessions["b"], "already ended")):
        if text == "already ended":
            abc.call("session.end", session_id=session_id)
        for method in ("session.heartbeat", "session.setIntent", "session.setTask"):
            assert text in str(abc.refused(method, session_id=session_id))


def test_intent_and_task_are_set_and_cleared(abc):
    session = abc.sessions["a"]
    assert abc.call("session.setIntent", session_id=session, intent="parse")["intent"] == "parse"
    assert thrum.ns_of(abc.call("session.setTask", session_id=session, current_task="t-1")["task_updated_at"])
    assert abc.call("session.list", agent_id="a")["sessions"][0]["intent"] == "parse"
    assert abc.call("session.setIntent", session_id=session, intent="")["intent"] == ""
    assert "intent" not in abc.call("session.list", agent_id="a")["sessions"][0]
    error = abc.refused("session.setIntent", session_id=session, intent="é" * thrum.TEXT_MAX)
    assert error.code == -32602 and "intent" in str(error)


def test_a_session_is_listed_newest_first_with_the_references_fields(abc):
    rows = abc.call("session.list")["sessions"]
    assert [row["agent_id"] for row in rows] == ["c", "b", "a"]
    for row in rows:
        assert {"session_id", "agent_id", "started_at", "last_seen_at", "status"} <= set(row)


# ---- groups

def test_groups_are_made_filled_and_listed(abc):
    made = abc.call("group.create", name="backend", description="who serves", caller_agent_id="a")
    assert set(made) == {"group_id", "name", "created_at"} and made["group_id"].startswith("grp_")
    added = abc.call("group.member.add", group="@backend", member_value="@b")
    assert (added["group"], added["member_type"], added["member_value"]) == ("backend", "agent", "b")
    before = abc.ledger.journal.last
    assert abc.call("group.member.add", group="backend", member="b") == added, "twice is once, and the seeds' spelling is read"
    assert abc.ledger.journal.last == before
    abc.call("group.member.add", group="backend", member_type="role", member_value="x")
    groups = {group["name"]: group for group in abc.call("group.list")["groups"]}
    assert list(groups) == sorted(groups)
    assert (groups["backend"]["member_count"], groups["backend"]["description"]) == (2, "who serves")
    assert set(groups["backend"]) == {"group_id", "name", "description", "member_count", "created_at"}
    assert groups["everyone"]["group_id"] == "grp_everyone" and groups["everyone"]["member_count"] == 1


@pytest.mark.parametrize(("params", "text"), [
    ({"group": "everyone", "member_value": "b"}, "cannot modify members of built-in @everyone group"),      # vector 31
    ({"group": "nope", "member_value": "b"}, 'group "nope" not found'),
    ({"group": "g", "member_value": "ghost"}, 'agent "ghost" not found — agent must be registered'),
    ({"group": "g", "member_type": "role", "member_value": "ghost"}, 'role "ghost" not found — no registered agents'),
    ({"group": "g", "member_type": "team", "member_value": "b"}, 'invalid member_type "team"'),
    ({"group": "g", "member_type": "group", "member_value": "nope"}, 'group "nope" not found'),
    ({"group": "g", "member_type": "group", "member_value": "g"}, "cannot be inside itself"),
])
def test_group_members_are_refused_with_the_references_words(abc, params, text):
    abc.call("group.create", name="g")
    assert text in str(abc.refused("group.member.add", **params))


def test_nested_groups_reach_all_inside_and_cycles_are_refused(abc):
    for name in ("outer", "middle", "inner"):
        abc.call("group.create", name=name)
    abc.call("group.member.add", group="outer", member_type="group", member_value="middle")
    abc.call("group.member.add", group="middle", member_type="group", member_value="inner")
    abc.call("group.member.add", group="inner", member_value="b")
    abc.call("group.member.add", group="middle", member_value="c")
    assert "inside itself" in str(abc.refused("group.member.add", group="inner", member_type="group", member_value="outer"))
    assert [r["agent_id"] for r in abc.send("a", mentions=["@outer"])["recipients"]] == ["b", "c"]


@pytest.mark.parametrize("name", ["everyone", "a", "y", "all", "daemon", "../g", "two words", "g\n", "@", "g" * 65])
def test_a_group_name_hides_nobody_and_is_harmless(abc, name):
    abc.refused("group.create", name=name)


def test_a_group_exists_once(abc):
    abc.call("group.create", name="g")
    assert str(abc.refused("group.create", name="g")) == 'group "g" already exists'


# ---- sending

def test_to_a_role(abc):
    """Vector 12."""
    sent = abc.send("a", mentions=["@y"])
    assert sent["audiences"] == [{"type": "group", "value": "y"}] and sent["resolved_to"] == 1
    assert sent["warnings"] == ["@y resolved to a group, not an individual agent"]
    assert sent["recipients"] == [{"agent_id": who, "delivered_at": sent["created_at"]} for who in "bc"]
    message = abc.get(sent["message_id"])
    assert message["scopes"] == [{"type": "group", "value": "y"}] and message["refs"] == [{"type": "group", "value": "y"}]


def test_to_an_agent(abc):
    """Vectors 13 and 17."""
    sent = abc.send("a", mentions=["@b"])
    assert sent["audiences"] == [{"type": "agent", "value": "b"}] and sent["resolved_to"] == 1 and "warnings" not in sent
    assert [r["agent_id"] for r in sent["recipients"]] == ["b"]
    message = abc.get(sent["message_id"])
    assert message["refs"] == [{"type": "mention", "value": "b"}] and message["scopes"] == []
    assert message["audiences"] == [{"type": "mention", "value": "b"}]
    assert abc.inbox("b", for_agent_role="y") == ["hello"] and abc.inbox("c", for_agent_role="y") == []


def test_unknown_recipients_refuse_the_whole_send(abc):
    """Vector 14: one error names all of them, and nothing is stored (`refused` looks)."""
    error = abc.refused("message.send", caller_agent_id="a", content="x", mentions=["@b", "@ghost", "@g2"])
    assert str(error) == "unknown recipients: @ghost, @g2 — no matching agent, role, or group found"
    assert abc.call("message.list")["total"] == 0 and abc.inbox("b") == []


@pytest.mark.parametrize("mention", ["@", "", "@all", "@broadcast", "@B", "@b ", "@@b", "b,c", "@../b"])
def test_what_is_nobody_is_unknown(abc, mention):
    assert "unknown recipients" in str(abc.refused("message.send", caller_agent_id="a", content="x", mentions=[mention]))


def test_to_nobody_in_particular_is_to_everybody_else(abc):
    """Vectors 15 and 19."""
    sent = abc.send("a", "to all")
    assert sent["audiences"] == [{"type": "broadcast", "value": "everyone"}] and sent["resolved_to"] == 0
    assert [r["agent_id"] for r in sent["recipients"]] == ["b", "c"] and "warnings" not in sent
    assert abc.inbox("leon") == ["to all"], "somebody unregistered sees broadcasts"
    assert abc.inbox("a") == [], "an author does not"


def test_to_everyone_by_name(abc):
    """Vectors 16 and 18."""
    sent = abc.send("a", mentions=["@everyone"])
    assert "warnings" not in sent and sent["audiences"] == [{"type": "group", "value": "everyone"}]
    assert {"type": "group", "value": "everyone"} in abc.get(sent["message_id"])["scopes"]
    assert [r["agent_id"] for r in sent["recipients"]] == ["b", "c"] and abc.inbox("leon") == []


def test_the_same_recipient_twice_counts_once(abc):
    """Vector 40, and other spellings of it: one audience, one delivery, one row in the log."""
    for mentions in (["@b", "@b"], ["@b", "b"]):
        sent = abc.send("a", mentions=mentions)
        assert sent["audiences"] == [{"type": "agent", "value": "b"}] and sent["resolved_to"] == 1, mentions
        assert [r["agent_id"] for r in sent["recipients"]] == ["b"]
        assert abc.get(sent["message_id"])["refs"] == [{"type": "mention", "value": "b"}]
    sent = abc.send("a", mentions=["@y"], scopes=[{"type": "group", "value": "y"}], refs=[{"type": "group", "value": "y"}])
    assert sent["audiences"] == [{"type": "group", "value": "y"}] and sent["resolved_to"] == 1
    assert sent["warnings"] == ["@y resolved to a group, not an individual agent"]


def test_scopes_and_refs_of_routing_types_are_what_they_say(abc):
    """Hardening 8 of the contract: a forged mention reaches whom it names, and nobody who does not exist."""
    for extra in ({"refs": [{"type": "mention", "value": "b"}]}, {"refs": [{"type": "group", "value": "y"}]},
                  {"scopes": [{"type": "group", "value": "y"}]}):
        sent = abc.send("a", **extra)
        assert "b" in [r["agent_id"] for r in sent["recipients"]] and sent["audiences"][0]["type"] != "broadcast", extra
    for extra in ({"refs": [{"type": "mention", "value": "ghost"}]}, {"scopes": [{"type": "group", "value": "ghost"}]},
                  {"refs": [{"type": "group", "value": "ghost"}]}):
        assert "unknown recipients: @ghost" in str(abc.refused("message.send", caller_agent_id="a", content="x", **extra))
    assert "reply_to message not found: msg_nope" in str(abc.refused(
        "message.send", caller_agent_id="a", content="x", refs=[{"type": "reply_to", "value": "msg_nope"}]))


def test_labels_are_kept_once_and_route_nobody(abc):
    label = {"type": "module", "value": "lexer"}
    sent = abc.send("a", scopes=[label, label, {"type": "agent", "value": "b"}], refs=[{"type": "pr", "value": "7"}],
                    tags=["urgent", "urgent"])
    message = abc.get(sent["message_id"])
    assert message["scopes"] == [label, {"type": "agent", "value": "b"}]
    assert message["refs"] == [{"type": "pr", "value": "7"}, {"type": "tag", "value": "urgent"}]
    assert sent["audiences"][0]["type"] == "broadcast"
    assert abc.call("message.list", scope=label)["total"] == 1
    assert abc.call("message.list", ref={"type": "tag", "value": "urgent"})["total"] == 1


@pytest.mark.parametrize(("form", "text"), [("markdown", "# x"), ("plain", "x"), ("json", "not parsed {")])
def test_formats_are_kept(abc, form, text):
    assert abc.get(abc.send("a", text, format=form)["message_id"])["body"] == {"format": form, "content": text}


def test_an_unknown_format_is_refused(abc):
    assert str(abc.refused("message.send", caller_agent_id="a", content="x", format="html")) == (
        "invalid format: html (must be 'markdown', 'plain', or 'json')")


def test_structured_payloads_come_back_as_text_with_sorted_keys(abc):
    sent = abc.send("a", structured={"b": {"z": 1, "a": None}, "a": "ü"})
    assert abc.get(sent["message_id"])["body"]["structured"] == '{"a":"ü","b":{"a":null,"z":1}}'
    assert abc.get(abc.send("a", structured={})["message_id"])["body"]["structured"] == "{}"


def test_the_largest_message_is_kept_and_one_byte_more_is_refused(abc):
    """Decision 22: the limit is that of the event's line; the error names it and the way out."""
    for _ in range(10):     # so that the number in the line keeps its width
        abc.send("a", "x", mentions=["@b"])
    (line,) = [line for seq, line in abc.ledger.journal.read(abc.ledger.journal.last - 1)]
    room = thrum.LINE_MAX - len(line) + 1
    error = abc.refused("message.send", caller_agent_id="a", content="x" * (room + 1), mentions=["@b"])
    assert "65,535" in str(error) and "file" in str(error)
    sent = abc.send("a", "x" * room, mentions=["@b"])
    assert len(abc.get(sent["message_id"])["body"]["content"]) == room
    (line,) = [line for seq, line in abc.ledger.journal.read(abc.ledger.journal.last - 1)]
    assert len(line) == thrum.LINE_MAX


def test_any_text_comes_back_as_it_was(abc):
    for text in ("é ü 漢字 🎉", "\u2028\u2029<>&", "\r\n\t", "\x1b[31mred", '"quoted" \\ \\u0041', "\x7f\x80", " ", "a" * 20_000):
        assert abc.get(abc.send("a", text)["message_id"])["body"]["content"] == text


def test_a_send_key_sends_once_per_author(abc):
    first = abc.send("a", "once", mentions=["@b"], send_key="k")
    before = abc.ledger.journal.last
    again = abc.send("a", "once", mentions=["@b"], send_key="k")
    assert abc.ledger.journal.last == before
    for field in ("message_id", "created_at", "audiences", "recipients", "resolved_to", "seq"):
        assert again[field] == first[field], field
    assert abc.send("c", "another author", mentions=["@b"], send_key="k")["message_id"] != first["message_id"]
    assert sorted(abc.inbox("b")) == ["another author", "once"]
    abc.call("session.end", session_id=abc.sessions["a"])
    assert abc.send("a", "once", mentions=["@b"], send_key="k")["message_id"] == first["message_id"], "the session may be over"
    assert abc.refused("message.send", caller_agent_id="c", content="x", send_key="k" * 257).code == -32602


def test_a_send_key_holds_within_one_batch_and_after_a_rebuild(abc):
    row = thrum.METHODS["message.send"]
    params = {"content": "once", "mentions": ["@b"], "send_key": "k", "caller_agent_id": "a"}
    outcomes, _ = abc.ledger.commit([lambda context: row.handler(context, params)] * 3)
    assert len({outcome["message_id"] for outcome in outcomes}) == 1
    abc.close()
    with open(abc.places.database, "wb"):
        pass
    abc.open()
    assert abc.call("message.send", **params)["message_id"] == outcomes[0]["message_id"] and abc.inbox("b") == ["once"]


def test_sequences_are_those_of_the_journal(abc):
    sent = abc.send("a")
    assert sent["seq"] == abc.ledger.journal.last == abc.get(sent["message_id"])["seq"]
    assert [seq for seq, event in abc.events] == [sent["seq"]]


# ---- threads

def test_a_reply_opens_a_thread_that_its_parent_joins(abc):
    """Vector 22, and decision 2: the id is that of the parent, so that two machines open the same."""
    parent = abc.send("a", mentions=["@b"])
    assert "thread_id" not in parent and "thread_id" not in abc.get(parent["message_id"])
    reply = abc.send("b", "yes", mentions=["@a"], reply_to=parent["message_id"])
    thread = "thr_" + parent["message_id"][4:]
    assert reply["thread_id"] == thread == abc.get(parent["message_id"])["thread_id"]
    message = abc.get(reply["message_id"])
    assert message["reply_to"] == parent["message_id"] and {"type": "reply_to", "value": parent["message_id"]} in message["refs"]
    assert "thread_id" not in message["scopes"] and message["audiences"] == [{"type": "mention", "value": "a"}]
    second = abc.send("a", "good", mentions=["@b"], reply_to=reply["message_id"])
    assert second["thread_id"] == thread
    listed = abc.call("message.list", thread_id=thread, sort_order="asc")
    assert [m["message_id"] for m in listed["messages"]] == [m["message_id"] for m in (parent, reply, second)]


def test_a_reply_adds_no_recipient_of_itself(abc):
    parent = abc.send("a", mentions=["@b"])
    assert abc.send("b", reply_to=parent["message_id"])["audiences"] == [{"type": "broadcast", "value": "everyone"}]


def test_thread_id_continues_a_thread_also_that_of_a_lone_message(abc):
    parent = abc.send("a", mentions=["@b"])
    thread = "thr_" + parent["message_id"][4:]
    assert abc.send("b", "in it", mentions=["@a"], thread_id=thread)["thread_id"] == thread
    assert abc.call("message.list", thread_id=thread)["total"] >= 1
    other = abc.send("a", "elsewhere", mentions=["@b"])
    assert "thread" in str(abc.refused("message.send", caller_agent_id="b", content="x", thread_id=thread, reply_to=other["message_id"]))
    assert "thread not found: thr_nope" in str(abc.refused("message.send", caller_agent_id="b", content="x", thread_id="thr_nope"))


def test_the_thread_of_a_lone_message_holds_that_message_too(abc):
    """Who continues `thr_X` of msg_X must find msg_X in the thread: it is the message that they continue."""
    parent = abc.send("a", "question", mentions=["@b"])
    thread = "thr_" + parent["message_id"][4:]
    abc.send("b", "answer", mentions=["@a"], thread_id=thread)
    listed = abc.call("message.list", thread_id=thread, sort_order="asc")["messages"]
    assert [m["body"]["content"] for m in listed] == ["question", "answer"]


def test_a_reply_to_a_deleted_message_is_allowed_and_to_none_refused(abc):
    parent = abc.send("a", mentions=["@b"])
    abc.call("message.delete", message_id=parent["message_id"])
    assert abc.send("b", reply_to=parent["message_id"])["thread_id"]
    assert str(abc.refused("message.send", caller_agent_id="b", content="x", reply_to="msg_nope")) == (
        "reply_to message not found: msg_nope")


def test_an_answer_is_never_older_than_its_question(abc):
    parent = abc.send("a", mentions=["@b"])
    abc.world.at -= 3600 * thrum.NS
    reply = abc.send("b", reply_to=parent["message_id"])
    assert reply["created_at"] > parent["created_at"]


# ---- getting and listing

SUMMARY = {"message_id", "agent_id", "body", "created_at", "deleted", "is_read"}
DETAIL = {"message_id", "author", "body", "scopes", "refs", "metadata", "created_at", "deleted"}


def test_get_has_the_references_shape_and_marks_nothing(abc):
    sent = abc.send("a", mentions=["@b"])
    message = abc.get(sent["message_id"])
    assert DETAIL <= set(message) <= DETAIL | {"thread_id", "reply_to", "updated_at", "audiences", "recipients", "seq"}
    assert message["author"] == {"agent_id": "a", "session_id": abc.sessions["a"]} and message["metadata"] == {}
    assert message["recipients"] == [{"agent_id": "b", "delivered_at": message["created_at"]}]
    assert abc.call("message.list", for_agent="b")["unread"] == 1
    assert str(abc.refused("message.get", message_id="msg_nope")) == "message not found: msg_nope"


def test_list_has_the_references_shape(abc):
    abc.send("a", mentions=["@b"])
    listed = abc.call("message.list", for_agent="b")
    assert {"messages", "total", "unread", "page", "page_size", "total_pages"} <= set(listed)
    (message,) = listed["messages"]
    assert SUMMARY <= set(message) <= SUMMARY | {"thread_id", "reply_to", "updated_at", "seq"}
    assert (listed["total"], listed["unread"], listed["page"], listed["page_size"], listed["total_pages"]) == (1, 1, 1, 10, 1)
    assert (listed["last_seq"], listed["epoch"]) == (abc.ledger.journal.last, abc.ledger.journal.epoch)


@pytest.fixture
def many(abc):
    """25 messages from a to b, `m00` to `m24`, and 5 from c to b, `c0` to `c4`."""
    abc.ids = [abc.send("a", f"m{n:02}", mentions=["@b"])["message_id"] for n in range(25)]
    abc.ids += [abc.send("c", f"c{n}", mentions=["@b"])["message_id"] for n in range(5)]
    return abc


def test_pages_are_complete_disjoint_and_in_order(many):
    expected = [f"c{n}" for n in range(4, -1, -1)] + [f"m{n:02}" for n in range(24, -1, -1)]
    pages = [many.call("message.list", for_agent="b", page=page, page_size=7) for page in range(1, 6)]
    assert [m["body"]["content"] for page in pages for m in page["messages"]] == expected
    assert {(p["total"], p["total_pages"], p["page_size"]) for p in pages} == {(30, 5, 7)}
    assert many.call("message.list", for_agent="b", page=6, page_size=7)["messages"] == []
    assert many.inbox("b", sort_order="asc", page_size=100) == expected[::-1]


@pytest.mark.parametrize(("asked", "given"), [(0, 10), (-1, 1), (-5, 1), (1, 1), (100, 100), (101, 100), (10**9, 100)])
def test_a_page_size_is_within_1_and_100(many, asked, given):
    for method in ("message.list", "message.outbox"):
        found = many.call(method, caller_agent_id="a", page_size=asked)
        assert found["page_size"] == given and len(found["messages"]) <= given


@pytest.mark.parametrize("page", [0, -3])
def test_a_page_before_the_first_is_the_first(many, page):
    found = many.call("message.list", for_agent="b", page=page)
    assert found["page"] == 1 and len(found["messages"]) == 10


def test_filters_narrow_and_combine(many):
    many.send("c", "labelled", mentions=["@b"], scopes=[{"type": "module", "value": "m"}], refs=[{"type": "pr", "value": "1"}])
    many.send("c", "to all")
    many.send("c", "to the role", mentions=["@y"])
    many.send("b", "own")

    def texts(**filters):
        return sorted(m["body"]["content"] for m in many.call("message.list", page_size=100, **filters)["messages"])

    assert len(texts()) == 34
    assert texts(author_id="b") == ["own"]
    assert texts(for_agent="b", author_id="c", scope={"type": "module", "value": "m"}) == ["labelled"]
    assert texts(scope={"type": "module", "value": "other"}) == []
    assert texts(ref={"type": "pr", "value": "1"}) == ["labelled"]
    assert texts(for_agent="b", caller_agent_id="b", mentions=True, author_id="c") == ["c0", "c1", "c2", "c3", "c4", "labelled"]
    assert texts(mention_role="@b", author_id="a") == [f"m{n:02}" for n in range(25)]
    assert texts(exclude_self=True, caller_agent_id="b", author_id="b") == []
    assert texts(for_agent="b", caller_agent_id="b", exclude_self=True, author_id="c")[-3:] == ["labelled", "to all", "to the role"]
    listed = many.call("message.list", for_agent="b", page_size=100)["messages"]
    middle = next(m for m in listed if m["body"]["content"] == "m20")
    assert texts(for_agent="b", author_id="a", created_after=middle["created_at"]) == ["m21", "m22", "m23", "m24"]
    assert texts(for_agent="b", author_id="a", after_seq=middle["seq"]) == ["m21", "m22", "m23", "m24"]
    assert texts(author_id="nobody") == [] and texts(thread_id="thr_nope") == []


def test_after_seq_zero_is_from_the_beginning(many):
    assert many.call("message.list", for_agent="b", after_seq=0)["total"] == 30
    assert many.call("message.list", after_seq=many.ledger.journal.last)["total"] == 0


def test_sorting_by_update_puts_the_edited_first(many):
    many.call("message.edit", message_id=many.ids[3], content="edited", caller_agent_id="a")
    assert many.inbox("b", sort_by="updated_at")[0] == "edited"
    assert many.inbox("b")[0] == "c4"
    for params, text in (({"sort_by": "size"}, "invalid sort_by: size (must be 'created_at' or 'updated_at')"),
                         ({"sort_order": "up"}, "invalid sort_order: up (must be 'asc' or 'desc')")):
        assert str(many.refused("message.list", **params)) == text


def test_unread_is_one_definition_in_list_count_and_marks(many):
    def unread(**more):
        return many.call("message.list", for_agent="b", caller_agent_id="b", unread=True, **more)

    assert (unread()["total"], unread()["unread"]) == (30, 30)
    done = many.call("message.markRead", message_ids=many.ids[:10], caller_agent_id="b")
    assert (done["marked_count"], done["remaining"]) == (10, 20)
    assert (unread()["total"], unread()["unread"]) == (20, 20)
    assert many.call("message.list", for_agent="b")["unread"] == 20
    assert unread(author_id="c")["total"] == 5
    read = many.call("message.list", for_agent="b", sort_order="asc", page_size=11)["messages"]
    assert [m["is_read"] for m in read] == [True] * 10 + [False]
    assert many.call("message.list", unread_for_agent="b", caller_agent_id="a")["total"] == 20
    many.call("session.end", session_id=many.sessions["b"])
    assert unread()["total"] == 20, "the filter holds without a session (decision 16)"


# ---- what was sent, read, edited, deleted

def test_outbox_tells_each_recipients_state(abc):
    """Vector 20."""
    sent = abc.send("a", mentions=["@y"])["message_id"]
    (message,) = abc.call("message.outbox", caller_agent_id="a")["messages"]
    assert message["audiences"] == [{"type": "group", "value": "y"}] and message["read_count"] == 0
    assert [r["agent_id"] for r in message["recipients"]] == ["b", "c"] and "read_at" not in message["recipients"][0]
    assert abc.call("message.markRead", message_ids=[sent], caller_agent_id="b")["marked_count"] == 1
    (message,) = abc.call("message.outbox", caller_agent_id="a", to="@b")["messages"]
    assert message["read_count"] == 1
    assert {"agent_id", "delivered_at", "seen_at", "read_at"} == set(message["recipients"][0]), "read is neither shown nor pushed"
    assert abc.call("message.outbox", caller_agent_id="a", to="@b", unread=True)["total"] == 1, "c has not read it"
    answer = abc.call("message.markRead", message_ids=[sent], caller_agent_id="c")
    assert answer["also_read_by"] == {sent: ["b"]}
    assert abc.call("message.outbox", caller_agent_id="a", to="@b", unread=True)["messages"] == []
    assert abc.call("message.outbox", caller_agent_id="a")["messages"][0]["read_count"] == 2


def test_outbox_filters_by_whom_it_went_to(abc):
    abc.send("a", "to b", mentions=["@b"])
    abc.send("a", "to y", mentions=["@y"])
    abc.send("a", "to all")
    abc.send("a", "to everyone", mentions=["@everyone"])
    abc.send("b", "not mine")

    def texts(to):
        return [m["body"]["content"] for m in abc.call("message.outbox", caller_agent_id="a", to=to)["messages"]]

    assert texts("") == ["to everyone", "to all", "to y", "to b"], "newest first"
    assert texts("@everyone") == texts(" @Everyone ") == ["to everyone", "to all"]
    assert texts("y") == ["to y"] and texts("@c") == ["to everyone", "to all", "to y"] and texts("ghost") == []
    for to in ("@", "  ", " @ "):
        assert str(abc.refused("message.outbox", caller_agent_id="a", to=to)) == "invalid to filter"
    found = abc.call("message.outbox", caller_agent_id="a", page_size=3, page=2)
    assert (found["total"], found["page"], found["page_size"], found["total_pages"], len(found["messages"])) == (4, 2, 3, 2, 1)


def test_only_a_recipient_reads(abc):
    """Vector 21 as decided: a receipt changes the reader's own delivery and makes none (lesson 3)."""
    sent = abc.send("a", mentions=["@b"])["message_id"]
    for other in ("c", "a", "ghost"):
        assert abc.call("message.markRead", message_ids=[sent], caller_agent_id=other)["marked_count"] == 0
    assert [r["agent_id"] for r in abc.get(sent)["recipients"]] == ["b"]


def test_reading_twice_writes_once_and_keeps_the_first_time(abc):
    sent = abc.send("a", mentions=["@b"])["message_id"]
    abc.call("message.markRead", message_ids=[sent, sent, "msg_nope"], caller_agent_id="b")
    assert len(abc.events) == 1
    first = abc.get(sent)["recipients"]
    abc.call("message.markRead", message_ids=[sent], caller_agent_id="b")
    assert abc.events == [] and abc.get(sent)["recipients"] == first
    assert str(abc.refused("message.markRead", caller_agent_id="b")) == "message_ids is required and must not be empty"
    assert str(abc.refused("message.markRead", message_ids=[], caller_agent_id="b")) == "message_ids is required and must not be empty"


def test_read_all_marks_what_was_listed_and_nothing_younger(many):
    """Lesson 2: mail that came after the list stays unread."""
    seen = many.call("message.list", for_agent="b")["last_seq"]
    many.send("a", "after the list", mentions=["@b"])
    done = many.call("message.markRead", all=True, up_to_seq=seen, caller_agent_id="b")
    assert (done["marked_count"], done["remaining"]) == (30, 1)
    assert many.inbox("b", unread=True) == ["after the list"]
    assert many.call("message.markRead", all=True, caller_agent_id="b")["marked_count"] == 1
    assert many.call("message.markRead", all=True, caller_agent_id="b")["marked_count"] == 0


def test_edit_replaces_and_says_so(abc):
    sent = abc.send("a", "one", format="plain", structured={"v": 1}, mentions=["@b"])["message_id"]
    first = abc.call("message.edit", message_id=sent, content="two", caller_agent_id="a")
    assert set(first) == {"message_id", "updated_at", "version"} and first["version"] == 1
    assert abc.get(sent)["body"] == {"format": "plain", "content": "two", "structured": '{"v":1}'}
    assert abc.call("message.edit", message_id=sent, structured={"v": 2}, caller_agent_id="a")["version"] == 2
    message = abc.get(sent)
    assert message["body"] == {"format": "plain", "content": "two", "structured": '{"v":2}'} and message["updated_at"]
    assert abc.inbox("b") == ["two"]


def test_edit_is_refused(abc):
    """Vector 23 and its neighbours."""
    sent = abc.send("a", mentions=["@b"])["message_id"]
    assert str(abc.refused("message.edit", message_id=sent, content="x", caller_agent_id="b")) == (
        "only message author can edit (author: a, current: b)")
    assert str(abc.refused("message.edit", message_id=sent, caller_agent_id="a")) == (
        "at least one of content or structured must be provided")
    assert str(abc.refused("message.edit", message_id="msg_nope", content="x")) == "message not found: msg_nope"
    assert "65,535" in str(abc.refused("message.edit", message_id=sent, content="x" * 70_000, caller_agent_id="a"))
    abc.call("message.delete", message_id=sent, caller_agent_id="a")
    assert str(abc.refused("message.edit", message_id=sent, content="x", caller_agent_id="a")) == f"cannot edit deleted message: {sent}"


@pytest.mark.parametrize("caller", ["a", "user:leon", ""])
def test_author_person_and_unnamed_may_edit_and_delete(abc, caller):
    """Decision 17."""
    sent = abc.send("a", mentions=["@b"])["message_id"]
    who = {"caller_agent_id": caller} if caller else {}
    assert abc.call("message.edit", message_id=sent, content="x", **who)["version"] == 1
    assert abc.call("message.delete", message_id=sent, **who)["deleted_at"]


def test_deleted_is_hidden_from_lists_and_told_by_get(abc):
    """Vectors 24 and 25 as decided (16): lists hide it, get shows it with its state, counts follow."""
    sent = abc.send("a", "oops", mentions=["@b"])["message_id"]
    assert "only message author can delete" in str(abc.refused("message.delete", message_id=sent, caller_agent_id="c"))
    done = abc.call("message.delete", message_id=sent, reason="typo", caller_agent_id="a")
    assert set(done) == {"message_id", "deleted_at"}
    message = abc.get(sent)
    assert message["deleted"] is True and message["body"]["content"] == "oops"
    assert message["metadata"] == {"deleted_at": done["deleted_at"], "delete_reason": "typo"}
    listed = abc.call("message.list", for_agent="b")
    assert (listed["messages"], listed["total"], listed["unread"]) == ([], 0, 0)
    assert abc.call("message.list")["total"] == 0
    assert str(abc.refused("message.delete", message_id=sent)) == f"message already deleted: {sent}"
    assert str(abc.refused("message.delete", message_id="msg_nope")) == "message not found: msg_nope"


def test_who_registers_later_gets_nothing_of_before(abc):
    """Decision 19."""
    abc.send("a", "before")
    abc.send("a", "to the role", mentions=["@y"])
    abc.agent("d", "y")
    abc.send("a", "after", mentions=["@y"])
    assert abc.inbox("d") == ["after"]


def test_answers_are_the_same_after_a_rebuild(many):
    many.send("b", "reply", mentions=["@a"], reply_to=many.ids[0])
    many.call("message.markRead", message_ids=many.ids[:3], caller_agent_id="b")
    many.call("message.edit", message_id=many.ids[1], content="edited", caller_agent_id="a")
    many.call("message.delete", message_id=many.ids[2], caller_agent_id="a")

    def answers():
        found = [many.call("message.list", for_agent=who, page_size=100) for who in ("a", "b", "c")]
        found += [many.call("message.outbox", caller_agent_id=who, page_size=100) for who in ("a", "b", "c")]
        found += [many.get(message_id) for message_id in many.ids]
        return found + [many.call("session.list")["sessions"], many.call("group.list")]

    before = answers()
    many.close()
    with open(many.places.database, "wb"):
        pass
    many.open()
    assert many.ledger.rebuilt and answers() == before


# ---- waiting: the handler, and through a daemon

def test_wait_gives_the_oldest_first_and_says_how_many_remain(many):
    start = many.call("message.list", for_agent="b", sort_order="asc", page_size=1)["messages"][0]["seq"] - 1
    found = many.call("message.wait", caller_agent_id="b", after_seq=start, page_size=4)
    assert [m["body"]["content"] for m in found["messages"]] == ["m00", "m01", "m02", "m03"] and found["remaining"] == 26
    assert found["after_seq"] == found["messages"][-1]["seq"] and found["epoch"] == many.ledger.journal.epoch
    seen, after = [], start
    while True:
        found = many.call("message.wait", caller_agent_id="b", after_seq=after, page_size=7)
        if not found:
            break
        seen += [m["body"]["content"] for m in found["messages"]]
        after = found["after_seq"]
    assert seen == [f"m{n:02}" for n in range(25)] + [f"c{n}" for n in range(5)], "nothing twice, nothing left out"


def test_wait_hears_only_what_was_asked_for(many):
    last = many.ledger.journal.last
    many.send("a", "for c", mentions=["@c"])
    many.send("b", "own", mentions=["@b", "@c"])
    assert many.call("message.wait", caller_agent_id="b", after_seq=last) is None
    assert len(many.call("message.wait", all=True, after_seq=last)["messages"]) == 2
    assert [m["agent_id"] for m in many.call("message.wait", caller_agent_id="c", after_seq=last, **{"from": "@a"})["messages"]] == ["a"]
    assert many.call("message.wait", caller_agent_id="c", after_seq=last, thread_id="thr_nope") is None
    assert many.call("message.wait", all=True, after_seq=last, mention_role="@c", scope={"type": "s", "value": "v"}) is None
    assert len(many.call("message.wait", all=True, after_seq=last, mention_role="@c")["messages"]) == 2


def test_wait_unread_returns_what_is_unread_already(many):
    assert many.call("message.wait", caller_agent_id="b", unread=True)["remaining"] == 20
    many.call("message.markRead", all=True, caller_agent_id="b")
    assert many.call("message.wait", caller_agent_id="b", unread=True) is None


def test_a_cursor_of_another_epoch_starts_at_the_oldest_unread(many):
    many.call("message.markRead", message_ids=many.ids[:5], caller_agent_id="b")
    found = many.call("message.wait", caller_agent_id="b", after_seq=10**6, epoch="of another journal")
    assert found["messages"][0]["body"]["content"] == "m05" and found["remaining"] == 15
    assert many.call("message.wait", caller_agent_id="b", after_seq=10**6, epoch=many.ledger.journal.epoch) is None


@pytest.fixture
def served(repo):
    """A repository with a daemon and the agents a (x), b and c (y)."""
    repo.ok("init")
    with repo.client() as client:
        for name, role in (("a", "x"), ("b", "y"), ("c", "y")):
            client.call("agent.register", name=name, role=role, module="core", force=True)
            client.call("session.start", agent_id=name)
    return repo


class Waiting(threading.Thread):
    """A `message.wait` on a connection of its own; `result()` joins it."""

    def __init__(self, repo, **params):
        super().__init__(daemon=True)
        self.client, self.params = repo.client(), params
        self.answer = None
        self.start()

    def run(self):
        try:
            self.answer = self.client.call("message.wait", **self.params)
        except thrum.ThrumError as error:
            self.answer = error

    def result(self):
        self.join(LONG)
        assert not self.is_alive(), "message.wait does not return"
        self.client.close()
        return self.answer


def test_waiters_are_woken_at_once_and_only_by_their_mail(served):
    with served.client() as client:
        after = client.call("health")["last_seq"]
        waiting = {who: Waiting(served, caller_agent_id=who, after_seq=after, timeout_ms=60_000) for who in "bc"}
        broad = Waiting(served, all=True, after_seq=after, timeout_ms=60_000)
        client.call("message.send", content="for b", mentions=["@b"], caller_agent_id="a")
        assert [m["body"]["content"] for m in waiting["b"].result()["messages"]] == ["for b"]
        assert [m["body"]["content"] for m in broad.result()["messages"]] == ["for b"]
        assert waiting["c"].is_alive()
        client.call("message.send", content="for c", mentions=["@y"], caller_agent_id="a")
        assert [m["body"]["content"] for m in waiting["c"].result()["messages"]] == ["for c"]


def test_a_message_between_two_waits_is_not_missed(served):
    with served.client() as client:
        first = client.call("message.wait", caller_agent_id="b", timeout_ms=0)
        assert (first["messages"], first["timed_out"], first["remaining"]) == ([], True, 0)
        client.call("message.send", content="between", mentions=["@b"], caller_agent_id="a")
        found = client.call("message.wait", caller_agent_id="b", after_seq=first["after_seq"], epoch=first["epoch"], timeout_ms=0)
        assert [m["body"]["content"] for m in found["messages"]] == ["between"]
        again = client.call("message.wait", caller_agent_id="b", after_seq=found["after_seq"], timeout_ms=0)
        assert again["messages"] == [] and again["after_seq"] == found["after_seq"]


def test_a_wait_ends_at_its_time_and_a_negative_one_at_once(served):
    world = thrum.World()
    with served.client() as client:
        for timeout_ms, least, most in ((200, 0.2, 5), (0, 0, 2), (-1, 0, 2)):
            begin = world.monotonic()
            assert client.call("message.wait", caller_agent_id="b", timeout_ms=timeout_ms)["timed_out"] is True
            assert least <= world.monotonic() - begin < most


def test_without_after_seq_only_what_comes_from_now_on(served):
    with served.client() as client:
        client.call("message.send", content="old", mentions=["@b"], caller_agent_id="a")
        assert client.call("message.wait", caller_agent_id="b", timeout_ms=0)["messages"] == []
        assert client.call("message.wait", caller_agent_id="b", timeout_ms=0, unread=True)["messages"][0]["body"]["content"] == "old"


def test_every_method_answers_through_the_daemon(served):
    """Dispatch, encoding and the real clock: the same table of right calls as above, over the socket."""
    with served.client() as client:
        session = client.call("agent.whoami", caller_agent_id="a")["session_id"]
        client.call("group.create", name="g")
        sent = client.call("message.send", content="first", mentions=["@b"], caller_agent_id="a")
        client.call("task.report", task_id="t", stream_type="turn_start")
        known = {"SESSION": session, "MESSAGE": sent["message_id"], "THREAD": "thr_" + sent["message_id"][4:],
                 "EPOCH": client.call("health")["epoch"], "TOP": str(served.path)}
        last = ("group.delete", "message.delete", "session.start", "session.end", "agent.delete", "daemon.stop")
        for method in sorted(thrum.METHODS, key=lambda name: last.index(name) if name in last else -1):
            params = {k: known.get(v, v) if isinstance(v, str) else [known.get(i, i) if isinstance(i, str) else i for i in v]
                      if isinstance(v, list) else v for k, v in RIGHT[method].items()}
            if method == "session.end":
                params["session_id"] = client.call("agent.whoami", caller_agent_id="a")["session_id"]
            if method == "message.send":        # the person cannot come by this socket
                params["caller_agent_id"] = "a"
                del params["acting_as"], params["if_last"]
            if method == "user.register":
                with pytest.raises(thrum.ThrumError) as caught:
                    client.call(method, **params)
                assert (caught.value.code, str(caught.value)) == (-32000, "User registration only available via WebSocket")
                continue
            if method == "daemon.stop":
                with pytest.raises(thrum.MethodNotFound) as caught:
                    client.call("nope.x")
            assert isinstance(client.call(method, **params), dict), method
        assert (caught.value.code, caught.value.data) == (-32601, "method 'nope.x' is not registered")      # vector 3
