"""What senders are told is true: stored, pushed, shown, read, answered, overdue, away, repeated, moved on, edited.

Most run on a ledger in this process, with a clock that a test moves; what the commands print has a team of two.
"""

import itertools
import json
import os
import random
import re
import subprocess
import threading

import pytest

import thrum
from conftest import FakeWorld
from generate import places_in
from team import END_S, Proxy, finish, start
from team import Team as Two
from test_ledger import do, journal_events
from test_ledger import start as new_ledger
from test_methods import Team

MINUTE = 60 * thrum.NS
HOUR = 60 * MINUTE
DAY = 24 * HOUR
STATES = ("delivered_at", "pushed_at", "seen_at", "read_at", "answered_at")


class Office(Team):
    """ada, bob and cy at work, and what the daemon's housekeeping does once a minute."""

    def fill(self):
        for name, role in (("ada", "planner"), ("bob", "builder"), ("cy", "builder")):
            self.agent(name, role, module=name)
        return self

    def present(self, name, minutes, every=1):
        """An agent gives a sign of life each `every` minutes, for so long."""
        for _ in range(0, minutes, every):
            self.world.at += every * MINUTE
            self.sign(name)

    def sign(self, *names):
        for name in names:
            self.ledger.seen[name] = self.world.at
        self.housekeeping()

    def housekeeping(self):
        (outcome,), _ = self.ledger.commit([lambda context: self.ledger.note_presence()])
        assert outcome is None

    def states(self, message_id, who="ada"):
        """The states of a message's recipients by id: what outbox, get and trace say, which must be the same."""
        def by_id(states, *without):
            return {state["agent_id"]: {k: v for k, v in state.items() if k not in ("agent_id", *without)} for state in states}
        got = by_id(self.get(message_id).get("recipients", []))
        sent = {m["message_id"]: m for m in self.call("message.outbox", caller_agent_id=who, page_size=100)["messages"]}[message_id]
        assert by_id(sent.get("recipients", []), "overdue", "gone") == got
        traced = self.call("message.trace", message_id=message_id)["recipients"]
        assert by_id(traced, "overdue", "gone", "state", "last_seen_at", "host") == got
        assert sent["read_count"] == sum("read_at" in state for state in got.values())
        for state in traced:
            last = [field for field in STATES if field in state]
            word = {"delivered_at": "delivered", "pushed_at": "pushed", "seen_at": "seen", "read_at": "read", "answered_at": "answered"}
            assert state["state"] == word[max(last, key=STATES.index)]
        for state in got.values():
            stamps = [state[field] for field in STATES if field in state]
            assert stamps[0] == self.get(message_id)["created_at"] and all(stamps[0] <= stamp for stamp in stamps)
        return got

    def fields(self, message_id, name="bob"):
        return set(self.states(message_id)[name])

    def overdue(self, who="ada"):
        """(message, reader) pairs that `sent --overdue` lists; the inbox must count as many."""
        found = self.call("message.outbox", caller_agent_id=who, overdue=True, page_size=100)
        pairs = {(m["message_id"], r["agent_id"]) for m in found["messages"] for r in m["recipients"] if r.get("overdue")}
        assert {m["message_id"] for m in found["messages"]} == {m for m, _ in pairs} and found["total"] == len(found["messages"])
        whole = {(m["message_id"], r["agent_id"]) for m in self.call("message.outbox", caller_agent_id=who, page_size=100)["messages"]
                 for r in m.get("recipients", []) if r.get("overdue")}
        assert whole == pairs, "all of `sent` marks the same ones"
        inbox = self.call("message.list", for_agent=who, caller_agent_id=who)
        assert inbox.get("overdue", 0) == len({message for message, _ in pairs})
        return pairs

    def restart(self, *, rebuild=False):
        self.close()
        if rebuild:
            os.unlink(self.places.database)
        self.open()


@pytest.fixture
def office(tmp_path):
    made = Office(tmp_path).fill()
    yield made
    made.close()


# ---- delivery states

def test_each_state_is_told_when_it_is_true_and_not_before(office):
    sent = office.send("ada", "m", mentions=["@bob", "@cy"])["message_id"]
    seen = [{"delivered_at"}]

    def now(*fields):
        assert office.fields(sent) == seen[-1] | set(fields)
        seen.append(seen[-1] | set(fields))
        assert office.fields(sent, "cy") == {"delivered_at"}, "each recipient has states of its own"
    now()
    office.call("message.list", for_agent="bob", caller_agent_id="bob", unread=True)
    office.call("message.wait", caller_agent_id="bob", after_seq=0)
    office.call("message.get", message_id=sent)
    now()                                                   # being asked for is not being handed over
    office.call("message.markShown", message_ids=[sent], route="wait", pushed=True, caller_agent_id="bob")
    now("pushed_at", "route")
    assert office.states(sent)["bob"]["route"] == "wait"
    office.call("message.markShown", message_ids=[sent], route="inbox", caller_agent_id="bob")
    now("seen_at", "shown_at")
    office.call("message.markRead", message_ids=[sent], caller_agent_id="bob")
    now("read_at")
    answer = office.send("bob", "yes", reply_to=sent, mentions=["@ada"])["message_id"]
    now("answered_at", "answer")
    state = office.states(sent)["bob"]
    assert [state[f] for f in STATES] == sorted(state[f] for f in STATES)
    assert len({state[f] for f in STATES}) == 5 and state["shown_at"] == state["seen_at"] and state["answer"] == answer
    before = office.states(sent)
    for rebuild in (False, True):
        office.restart(rebuild=rebuild)
        assert office.states(sent) == before


def test_no_state_changes_a_second_time(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    steps = [("message.markShown", {"message_ids": [sent], "route": "wait", "pushed": True}),
             ("message.markShown", {"message_ids": [sent, sent], "route": "inbox"}), ("message.markRead", {"message_ids": [sent]})]
    for method, params in steps:
        office.call(method, caller_agent_id="bob", **params)
    office.send("bob", "yes", reply_to=sent, mentions=["@ada"])
    before, seq = office.states(sent), office.ledger.journal.last
    for method, params in itertools.chain(steps, steps[::-1]):
        office.call(method, caller_agent_id="bob", **{**params, **({"route": "other"} if "route" in params else {})})
    assert office.ledger.journal.last == seq, "nothing more is written either"
    office.send("bob", "yes again", reply_to=sent, mentions=["@ada"])
    assert office.states(sent) == before
    events = journal_events(office.places)
    assert sum(e["type"] == "message.receipt" for e in events) == 2 and sum(e["type"] == "message.route" for e in events) == 1


@pytest.mark.parametrize("first", ["read", "answer", "shown"])
def test_steps_that_are_left_out_are_not_claimed(office, first):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    if first == "read":
        office.call("message.markRead", message_ids=[sent], caller_agent_id="bob")
        assert office.fields(sent) == {"delivered_at", "seen_at", "read_at"}, "who reads has seen; how it was pushed nobody knows"
        office.call("message.markShown", message_ids=[sent], route="inbox", caller_agent_id="bob")
        assert "shown_at" not in office.fields(sent)
    elif first == "answer":
        office.send("bob", "yes", reply_to=sent, mentions=["@ada"])
        assert office.fields(sent) == {"delivered_at", "answered_at", "answer"}
    else:
        office.call("message.markShown", message_ids=[sent], route="hook", caller_agent_id="bob")
        assert office.fields(sent) == {"delivered_at", "pushed_at", "route", "seen_at", "shown_at"}


def test_nobody_else_can_claim_anything(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    seq = office.ledger.journal.last
    for other in ("ada", "cy", "stranger"):
        assert office.call("message.markShown", message_ids=[sent], route="wait", caller_agent_id=other) == {
            "marked_count": 0, "pushed_count": 0}
        office.call("message.markRead", message_ids=[sent], caller_agent_id=other)
        office.call("message.markRead", all=True, caller_agent_id=other)
    assert office.call("message.markShown", message_ids=["msg_nowhere"], route="wait", caller_agent_id="bob")["pushed_count"] == 0
    assert office.ledger.journal.last == seq
    office.send("cy", "I answer what was not sent to me", reply_to=sent, mentions=["@ada"])
    assert set(office.states(sent)) == {"bob"} and office.fields(sent) == {"delivered_at"}


def test_an_answer_that_was_deleted_or_purged_is_none(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    first = office.send("bob", "yes", reply_to=sent, mentions=["@ada"])["message_id"]
    second = office.send("bob", "no", reply_to=sent, mentions=["@ada"])["message_id"]
    assert office.states(sent)["bob"]["answer"] == first
    office.call("message.delete", message_id=first)
    assert office.states(sent)["bob"]["answer"] == second
    office.call("message.deleteByAgent", agent_id="bob")
    assert "answer" not in office.fields(sent) and "answered_at" not in office.fields(sent)


@pytest.mark.parametrize("to", [["@everyone"], ["@builder"], ["@team"], None])
def test_states_of_group_role_and_broadcast_mail(office, to):
    office.call("group.create", name="team")
    for name in ("bob", "cy"):
        office.call("group.member.add", group="team", member_value=name)
    sent = office.send("ada", "m", **({"mentions": to} if to else {}))["message_id"]
    assert set(office.states(sent)) == {"bob", "cy"}
    office.call("message.markRead", message_ids=[sent], caller_agent_id="cy")
    assert office.fields(sent) == {"delivered_at"} and "read_at" in office.fields(sent, "cy")
    assert office.call("message.outbox", caller_agent_id="ada", unread=True)["total"] == 1
    office.call("message.markRead", message_ids=[sent], caller_agent_id="bob")
    assert office.call("message.outbox", caller_agent_id="ada", unread=True)["total"] == 0


def test_a_route_is_a_short_text(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    for route in ("x" * 257, "a\0b", "\ud800"):
        with pytest.raises(thrum.ThrumError):
            office.call("message.markShown", message_ids=[sent], route=route, caller_agent_id="bob")
    assert office.fields(sent) == {"delivered_at"}


def test_random_steps_of_many_agents_against_a_model(office):
    """Any order of pushing, showing, reading and answering by anybody: states are as by hand, live and rebuilt."""
    rng, wanted, ids = random.Random(7), {}, []
    names = ("ada", "bob", "cy")
    for _ in range(200):
        who, step = rng.choice(names), rng.random()
        if step < 0.2 or not ids:
            to = rng.sample([n for n in names if n != who], rng.randrange(1, 3))
            sent = office.send(who, "m", mentions=["@" + n for n in to])["message_id"]
            ids.append((sent, who))
            wanted.update({(sent, name): set() for name in to})
            continue
        message_id, author = rng.choice(ids)
        mine = wanted.get((message_id, who))
        if step < 0.4:
            office.call("message.markShown", message_ids=[message_id], route="wait", pushed=True, caller_agent_id=who)
            claimed = {"pushed"}
        elif step < 0.6:
            office.call("message.markShown", message_ids=[message_id], route="inbox", caller_agent_id=who)
            claimed = {"pushed", "seen"} if mine is not None and "read" not in mine else {"pushed"}
        elif step < 0.9:
            office.call("message.markRead", message_ids=[message_id], caller_agent_id=who)
            claimed = {"seen", "read"}
        elif author != who:
            ids.append((office.send(who, "re", reply_to=message_id, mentions=["@" + author])["message_id"], who))
            wanted[ids[-1][0], author] = set()
            claimed = {"answered"}
        if mine is not None:
            mine |= claimed
    for rebuild in (False, True):
        for message_id, author in ids:
            for name, state in office.states(message_id, author).items():
                assert {f[:-3] for f in STATES[1:] if f in state} == wanted[message_id, name], (message_id, name)
        office.restart(rebuild=rebuild)


# ---- overdue

def test_mail_is_overdue_after_a_quarter_of_an_hour_of_its_readers_presence(office):
    office.present("bob", 60)
    sent = office.send("ada", "m", mentions=["@bob", "@cy"])["message_id"]
    office.sign("bob")
    office.present("bob", 14)
    assert office.overdue() == set(), "the hour before does not count"
    office.present("bob", 2)
    assert office.overdue() == {(sent, "bob")}, "cy was not here"
    state = {s["agent_id"]: s for s in office.call("message.trace", message_id=sent)["recipients"]}
    assert state["bob"]["overdue"] is True and "overdue" not in state["cy"]
    assert office.overdue("bob") == office.overdue("cy") == set(), "only its sender is told"
    office.restart()
    office.housekeeping()
    assert office.overdue() == {(sent, "bob")}
    office.call("message.markShown", message_ids=[sent], route="inbox", caller_agent_id="bob")
    assert office.overdue() == {(sent, "bob")}, "shown is not read"
    office.call("message.markRead", message_ids=[sent], caller_agent_id="bob")
    assert office.overdue() == set()


def test_a_restart_does_not_hide_what_is_overdue(office):
    """The daemon says so from its first answer on, not only once somebody was heard of and a minute has passed."""
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    office.present("bob", 20)
    assert office.overdue() == {(sent, "bob")}
    office.restart()
    assert office.overdue() == {(sent, "bob")}


def test_breaks_and_absence_do_not_count(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    office.world.at += 3 * DAY
    office.housekeeping()
    assert office.overdue() == set(), "nobody was here at all"
    office.present("bob", 20 * 6, every=6)
    assert office.overdue() == set(), "signs of life with gaps between them are no presence"
    office.world.at += HOUR
    office.present("bob", 8)
    office.world.at += 5 * HOUR
    office.present("bob", 8)
    office.world.at += HOUR
    office.housekeeping()
    assert office.overdue() == set(), "7 + 7 minutes: each stretch is from its first sign to its last"
    office.present("bob", 4)
    assert office.overdue() == {(sent, "bob")}


@pytest.mark.parametrize("end", ["message.delete", "purge", "agent.delete of the sender", "by agent"])
def test_what_is_gone_is_not_overdue(office, end):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    office.present("bob", 20)
    assert office.overdue() == {(sent, "bob")}
    if end == "message.delete":
        office.call("message.delete", message_id=sent)
    elif end == "purge":
        office.call("purge.execute", before="2100-01-01T00:00:00Z")
    elif end == "by agent":
        office.call("message.deleteByAgent", agent_id="ada")
    else:
        office.call("agent.delete", name="ada")
    assert office.call("message.outbox", caller_agent_id="ada", overdue=True)["messages"] == []
    assert "overdue" not in office.call("message.list", for_agent="ada", caller_agent_id="ada")


def test_a_reader_that_was_deleted_is_gone_at_once(office):
    read = office.send("ada", "read", mentions=["@bob"])["message_id"]
    office.call("message.markRead", message_ids=[read], caller_agent_id="bob")
    sent = office.send("ada", "m", mentions=["@bob", "@cy"])["message_id"]
    office.call("agent.delete", name="bob")
    assert office.overdue() == {(sent, "bob")}
    states = {s["agent_id"]: s for s in office.call("message.trace", message_id=sent)["recipients"]}
    assert states["bob"]["gone"] is True and "gone" not in states["cy"]
    assert not any(s.get("gone") for s in office.call("message.trace", message_id=read)["recipients"])
    office.restart(rebuild=True)
    assert office.overdue() == {(sent, "bob")}
    office.agent("bob", "builder", module="bob")
    assert office.overdue() == set(), "it is back"


def test_nothing_is_overdue_for_more_than_a_week(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    at = office.world.at
    office.present("bob", 20)
    office.world.at = at + 7 * DAY - HOUR
    assert office.overdue() == {(sent, "bob")}
    office.world.at = at + 7 * DAY + HOUR
    assert office.overdue() == set()
    office.call("agent.delete", name="bob")
    assert office.overdue() == set()


def test_presence_is_bounded_and_of_agents_only(office):
    def rows():
        return office.ledger.store.value("select count(*) from presence")
    for _ in range(thrum.PRESENCE_MAX + 40):
        office.world.at += 10 * MINUTE
        office.sign("bob", "cy")
    assert rows() == 2 * thrum.PRESENCE_MAX
    office.ledger.seen.update({f"made-up-{n}": office.world.at for n in range(1000)})
    office.housekeeping()
    assert rows() == 2 * thrum.PRESENCE_MAX and office.ledger.seen == {}
    newest = office.ledger.store.value("select max(ended) from presence")
    assert newest == office.world.at, "the newest ones are kept"
    seq = office.ledger.journal.last
    office.present("bob", 5)
    assert office.ledger.journal.last == seq, "presence is no event"


def test_a_clock_that_is_set_back_does_no_harm(office):
    sent = office.send("ada", "m", mentions=["@bob"])["message_id"]
    office.present("bob", 5)
    office.world.at -= 2 * DAY
    office.present("bob", 5)
    office.world.at += 2 * DAY
    office.present("bob", 5)
    assert office.overdue() == set()
    assert all(row["began"] <= row["ended"] for row in office.ledger.store.rows("select * from presence"))
    office.present("bob", 12)
    assert office.overdue() == {(sent, "bob")}


@pytest.mark.parametrize("seed", range(6))
def test_overdue_against_a_model(office, seed):
    """Random signs of life of two readers, mail at random times: overdue is what a sum by hand says."""
    rng, sent, signs = random.Random(seed), [], {"bob": [], "cy": []}
    for _ in range(150):
        office.world.at += rng.choice((10, 60, 60, 60, 250, 299, 301, 2000, 20_000)) * thrum.NS
        if rng.random() < 0.1:
            to = rng.sample(("bob", "cy"), rng.randrange(1, 3))
            sent.append((office.send("ada", "m", mentions=["@" + n for n in to])["message_id"], office.world.at, to))
        name = rng.choice(("bob", "cy"))
        signs[name].append(office.world.at)
        office.sign(name)

    def active(name, since):
        return sum(max(0, b - max(a, since)) for a, b in zip(signs[name], signs[name][1:]) if b - a <= thrum.PRESENCE_GAP_S * thrum.NS)
    week = office.world.at - 7 * DAY
    wanted = {(m, name) for m, at, to in sent for name in to
              if active(name, thrum.ns_of(office.get(m)["created_at"])) >= thrum.OVERDUE_S * thrum.NS and at > week}
    assert office.overdue() == wanted


# ---- recipients that were not seen for a day

def test_one_that_was_not_seen_for_a_day(office):
    office.world.at += 23 * HOUR
    assert "warnings" not in office.send("ada", "m", mentions=["@bob"])
    office.world.at += 2 * HOUR
    assert office.send("ada", "m", mentions=["@bob"])["warnings"] == ["@bob was last seen 1d1h ago"]
    office.ledger.seen["bob"] = office.world.at         # just heard of, not yet written down
    assert "warnings" not in office.send("ada", "m", mentions=["@bob"])
    office.housekeeping()
    assert "warnings" not in office.send("ada", "m", mentions=["@bob"])
    assert office.send("ada", "m", mentions=["@cy"])["warnings"] == ["@cy was last seen 1d1h ago"]


def test_several_and_all_that_were_not_seen_for_a_day(office):
    for number in range(6):
        office.agent(f"x{number}", "other", module=f"x{number}")
    office.world.at += 2 * DAY
    office.ledger.seen["bob"] = office.world.at
    two = office.send("ada", "m", mentions=["@bob", "@cy"])
    assert two["warnings"] == ["1 of 2 recipients were not seen for 24 h: @cy"]
    group = office.send("ada", "m", mentions=["@builder"])
    assert group["warnings"] == ["@builder resolved to a group, not an individual agent",
                                 "1 of 2 recipients were not seen for 24 h: @cy"]
    everyone = office.send("ada", "m")
    (warning,) = everyone["warnings"]
    assert re.fullmatch(r"7 of 8 recipients were not seen for 24 h: (@\w+, ){4}@\w+ and 2 more", warning)
    assert "@ada" not in warning and "@bob" not in warning
    assert len(everyone["recipients"]) == 8, "they get it all the same"


def test_the_sender_and_the_present_are_not_warned_about(office):
    office.world.at += 2 * DAY
    office.ledger.seen.update(bob=office.world.at, cy=office.world.at)
    assert "warnings" not in office.send("ada", "m")
    assert "warnings" not in office.send("ada", "m", mentions=["@bob"])


# ---- send keys

def test_a_key_gives_the_first_message_whatever_happened_since(office):
    params = {"mentions": ["@bob"], "send_key": "k"}
    first = office.send("ada", "once", **params)
    for change in (lambda: None, office.restart, lambda: office.restart(rebuild=True),
                   lambda: office.call("message.markRead", message_ids=[first["message_id"]], caller_agent_id="bob"),
                   lambda: office.call("message.edit", message_id=first["message_id"], content="edited"),
                   lambda: office.call("message.delete", message_id=first["message_id"]), office.restart):
        change()
        seq = office.ledger.journal.last
        again = office.send("ada", "other words", **{**params, "mentions": ["@cy"]})
        assert again["repeated"] is True and office.ledger.journal.last == seq
        assert {k: again[k] for k in ("message_id", "created_at", "seq")} == {k: first[k] for k in ("message_id", "created_at", "seq")}
        assert [r["agent_id"] for r in again["recipients"]] == ["bob"] and again["resolved_to"] == first["resolved_to"]
        assert again["audiences"] == first["audiences"]
    mine = office.send("bob", "mine", mentions=["@ada"], send_key="k")
    assert mine["message_id"] != first["message_id"] and "repeated" not in mine


def test_the_key_of_a_removed_message_may_be_used_again(office):
    first = office.send("ada", "once", mentions=["@bob"], send_key="k")["message_id"]
    office.call("message.deleteByAgent", agent_id="ada")
    second = office.send("ada", "again", mentions=["@bob"], send_key="k")["message_id"]
    assert second != first and office.send("ada", "x", mentions=["@bob"], send_key="k")["message_id"] == second


def test_a_repeated_send_may_not_run_into_its_own_condition(office):
    """The retry of a conditional send finds its own message as the newest of the thread; it must get it, not a refusal."""
    last = office.send("bob", "question", mentions=["@ada"])["message_id"]
    first = office.send("ada", "answer", mentions=["@bob"], if_last=last, send_key="k")
    again = office.send("ada", "answer", mentions=["@bob"], if_last=last, send_key="k")
    assert again["message_id"] == first["message_id"] and again["repeated"] is True


# ---- conditional sending

def moved(office, *args, **params):
    error = office.refused("message.send", content="late", **params)
    assert isinstance(error, thrum.Conflict)
    return error


def test_a_send_that_nobody_was_faster_than(office):
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    first = office.send("ada", "answer", mentions=["@bob"], if_last=lone)
    assert first["thread_id"] == "thr_" + lone[4:], "it goes on in that thread"
    assert office.get(lone)["thread_id"] == first["thread_id"]
    second = office.send("ada", "more", mentions=["@bob"], if_last=first["message_id"])
    assert second["thread_id"] == first["thread_id"], "one's own newest message is no obstacle"
    reply = office.send("bob", "yes", mentions=["@ada"], if_last=second["message_id"], reply_to=lone)
    assert reply["thread_id"] == first["thread_id"]
    assert office.send("ada", "x", mentions=["@bob"], if_last=reply["message_id"], thread_id=first["thread_id"])


def test_a_send_whose_thread_has_moved_on(office):
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    answer = office.send("cy", "I know it", reply_to=lone, mentions=["@bob"])["message_id"]
    error = moved(office, caller_agent_id="ada", mentions=["@bob"], if_last=lone)
    assert str(error) == (f"the thread has moved on: @cy wrote {answer} after {lone}; read it, then send again with --if-last {answer}")
    newer = error.data["newer"]
    assert (newer["message_id"], newer["agent_id"], newer["body"]["content"]) == (answer, "cy", "I know it")
    reply = thrum.encode_reply(thrum.Call("message.send", {}, 1), error=error)
    wire = json.loads(reply)["error"]
    assert wire["code"] == -32000 and wire["data"]["newer"]["message_id"] == answer and wire["message"] == str(error)
    own = office.send("ada", "mine", mentions=["@bob"], if_last=answer)["message_id"]
    error = moved(office, caller_agent_id="ada", mentions=["@bob"], if_last=answer)
    assert own in str(error), "also when the newer one is one's own"


def test_the_newest_message_of_all_is_named(office):
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    ids = [office.send("cy", f"m{n}", reply_to=lone, mentions=["@bob"])["message_id"] for n in range(5)]
    for older in [lone, *ids[:-1]]:
        assert f"--if-last {ids[-1]}" in str(moved(office, caller_agent_id="ada", mentions=["@bob"], if_last=older))


def test_a_newest_message_that_was_deleted(office):
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    answer = office.send("cy", "wrong", reply_to=lone, mentions=["@bob"])["message_id"]
    office.call("message.delete", message_id=answer)
    assert office.send("ada", "x", mentions=["@bob"], if_last=lone)["thread_id"], "what was taken back does not count"


def test_if_last_names_a_deleted_message_that_nothing_follows(office):
    """Nothing came after it: an older message is not a newer one."""
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    answer = office.send("cy", "wrong", reply_to=lone, mentions=["@bob"])["message_id"]
    office.call("message.delete", message_id=answer)
    assert office.send("ada", "x", mentions=["@bob"], if_last=answer)["thread_id"]


def test_if_last_that_does_not_fit(office):
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    other = office.send("bob", "other", mentions=["@ada"])["message_id"]
    error = office.refused("message.send", caller_agent_id="ada", content="x", if_last="msg_nowhere")
    assert str(error) == "message not found: msg_nowhere"
    error = office.refused("message.send", caller_agent_id="ada", content="x", if_last=lone, thread_id="thr_" + other[4:])
    assert str(error) == f"{lone} is in thread thr_{lone[4:]}, not in thr_{other[4:]}"
    error = office.refused("message.send", caller_agent_id="ada", content="x", if_last=lone, reply_to=other)
    assert lone in str(error) or other in str(error)
    assert office.send("ada", "x", mentions=["@bob"], if_last=lone, thread_id="thr_" + lone[4:])["thread_id"] == "thr_" + lone[4:]


def test_of_two_conditional_sends_at_once_one_wins(office):
    """In one batch, as the daemon's writer gets them."""
    lone = office.send("bob", "question", mentions=["@ada"])["message_id"]
    send = thrum.METHODS["message.send"].handler
    outcomes, events = office.ledger.commit([
        lambda context, who=who: send(context, {"content": "me", "mentions": ["@bob"], "caller_agent_id": who, "if_last": lone})
        for who in ("ada", "cy", "ada")])
    assert [type(outcome) for outcome in outcomes] == [dict, thrum.Conflict, thrum.Conflict]
    assert outcomes[1].data["newer"]["message_id"] == outcomes[0]["message_id"]
    assert sum(event["type"] == "message.create" for _, event in events) == 1


# ---- edits

def test_the_history_of_an_edited_message(office):
    sent = office.send("ada", "one", mentions=["@bob"], structured={"v": 1})

    def history():
        return office.call("message.get", message_id=sent["message_id"], history=True)["message"].get("history")
    assert history() is None
    stamps = [sent["created_at"]]
    for number, (content, more) in enumerate((("two", {}), ("three", {"structured": {"v": 3}})), 1):
        done = office.call("message.edit", message_id=sent["message_id"], content=content, caller_agent_id="ada", **more)
        assert done["version"] == number
        stamps.append(done["updated_at"])
    found = history()
    assert [v["body"]["content"] for v in found] == ["one", "two", "three"]
    assert [v["at"] for v in found] == stamps == sorted(stamps)
    assert [json.loads(v["body"]["structured"])["v"] for v in found] == [1, 1, 3]
    assert found[1]["editor"] == found[2]["editor"] == "ada" and found[0].get("editor", "ada") == "ada"
    assert "history" not in office.get(sent["message_id"])
    office.call("message.delete", message_id=sent["message_id"])
    assert history() == found
    office.refused("message.edit", message_id=sent["message_id"], content="four", caller_agent_id="ada")
    office.restart(rebuild=True)
    assert history() == found
    office.call("message.deleteByAgent", agent_id="ada")
    office.refused("message.get", message_id=sent["message_id"], history=True)


def test_edits_of_others_are_refused_and_named(office):
    sent = office.send("ada", "one", mentions=["@bob"])["message_id"]
    office.refused("message.edit", message_id=sent, content="x", caller_agent_id="bob")
    office.call("message.edit", message_id=sent, content="by a person", caller_agent_id="user:dana")
    office.call("message.edit", message_id=sent, content="by nobody")
    found = office.call("message.get", message_id=sent, history=True)["message"]["history"]
    assert [v.get("editor") for v in found[1:]] == ["user:dana", None]


def test_edits_that_come_in_another_order_have_the_order_of_their_times(tmp_path):
    """Of two machines: the newest time is the text, the history is by time."""
    ledger = new_ledger(places_in(tmp_path))
    do(ledger, *[{"type": "agent.register", "agent_id": n, "name": n, "kind": "agent", "role": "r", "module": n} for n in ("ada", "bob")])
    base = ledger.world.at
    texts = {5: "five", 9: "nine", 7: "seven"}
    lines = [{"type": "message.create", "message_id": "msg_1", "agent_id": "ada", "recipients": ["bob"], "body": {"content": "one"},
              "refs": [{"type": "mention", "value": "bob"}], "timestamp": thrum.stamp_of(base + 11), "event_id": "evt_c"}]
    lines += [{"type": "message.edit", "message_id": "msg_1", "agent_id": "ada", "body": {"content": text},
               "timestamp": thrum.stamp_of(base + n * MINUTE), "event_id": f"evt_{n}"} for n, text in texts.items()]
    for order in itertools.permutations(lines):
        store = thrum.Store(":memory:", FakeWorld(), writable=True)
        store.create()
        for number, event in enumerate(order, 1):
            store.apply(event, number, thrum.ns_of(event["timestamp"]))
        store.settle()
        row = store.message("msg_1")
        assert row["content"] == "nine"
        assert [v["content"] for v in store.versions(row["seq"])] == ["one", "five", "seven", "nine"]
        store.close()


# ---- read all

def test_read_all_up_to_a_number(office):
    """What comes after the list was made stays unread."""
    ids = [office.send("ada", f"m{n}", mentions=["@bob"])["message_id"] for n in range(3)]
    listed = office.call("message.list", for_agent="bob", caller_agent_id="bob", unread=True)
    late = office.send("ada", "late", mentions=["@bob"])["message_id"]
    done = office.call("message.markRead", all=True, up_to_seq=listed["last_seq"], caller_agent_id="bob")
    assert (done["marked_count"], done["remaining"]) == (3, 1)
    assert [m["message_id"] for m in office.call("message.list", for_agent="bob", caller_agent_id="bob", unread=True)["messages"]] == [late]
    assert all("read_at" in office.fields(m) for m in ids) and "read_at" not in office.fields(late)
    assert office.call("message.markRead", all=True, up_to_seq=0, caller_agent_id="bob")["marked_count"] == 0
    assert office.call("message.markRead", all=True, caller_agent_id="bob") == {"marked_count": 1, "remaining": 0}
    assert office.call("message.markRead", all=True, caller_agent_id="bob") == {"marked_count": 0, "remaining": 0}


def test_read_all_of_very_many(office, monkeypatch):
    monkeypatch.setattr(thrum, "BATCH_READ_MAX", 4)
    ids = [office.send("ada", f"m{n}", mentions=["@bob"])["message_id"] for n in range(10)]
    office.call("message.delete", message_id=ids[9])
    counts = []
    while not counts or counts[-1][0]:
        done = office.call("message.markRead", all=True, caller_agent_id="bob")
        counts.append((done["marked_count"], done["remaining"]))
        assert done["remaining"] == office.call("message.list", for_agent="bob", caller_agent_id="bob")["unread"]
    assert counts == [(4, 5), (4, 1), (1, 0), (0, 0)]
    assert "read_at" not in office.fields(ids[9])


def test_read_all_marks_nothing_of_others(office):
    wide = office.send("ada", "all")["message_id"]
    office.call("message.markRead", all=True, caller_agent_id="bob")
    assert "read_at" in office.fields(wide) and "read_at" not in office.fields(wide, "cy")
    seq = office.ledger.journal.last
    office.call("message.markRead", all=True, caller_agent_id="stranger")
    assert set(office.states(wide)) == {"bob", "cy"} and office.ledger.journal.last == seq


# ---- the filters of the inbox

def inbox_of(office, messages, **filters):
    """The ids that bob's inbox has to show with these filters, by hand, newest first."""
    found = []
    for message in messages[::-1]:
        if "bob" in message["to"] and (not filters.get("author_id") or message["author"] == filters["author_id"]) \
                and (not filters.get("mentions") or message["named"]) and (not filters.get("scope") or message["scoped"]) \
                and (not filters.get("unread") or not message["read"]):
            found.append(message["id"])
    return found[::-1] if filters.get("sort_order") == "asc" else found


def test_filters_of_the_inbox_alone_and_combined(office):
    scope, messages = {"type": "module", "value": "core"}, []
    for author, to, scoped, read in itertools.product(("ada", "cy"), (["@bob"], ["@builder"], [], ["@ada"]), (False, True), (False, True)):
        sent = office.send(author, "m", mentions=to, scopes=[scope] if scoped else [])
        reads = "bob" in [r["agent_id"] for r in sent.get("recipients", [])]
        if read:
            office.call("message.markRead", message_ids=[sent["message_id"]], caller_agent_id="bob")
        messages.append({"id": sent["message_id"], "author": author, "to": ["bob"] if reads else [], "named": to == ["@bob"],
                         "scoped": scoped, "read": read})
    for author, mentions, scoped, unread, oldest in itertools.product((None, "ada", "cy", "bob", "nobody"), (None, True), (None, scope),
                                                                      (None, True), (None, "asc")):
        filters = thrum.compact(author_id=author, mentions=mentions, scope=scoped, unread=unread, sort_order=oldest)
        found = office.call("message.list", for_agent="bob", caller_agent_id="bob", exclude_self=True, page_size=100, **filters)
        wanted = inbox_of(office, messages, **filters)
        assert [m["message_id"] for m in found["messages"]] == wanted, filters
        assert found["total"] == len(wanted)
        by_id = {m["id"]: m for m in messages}
        assert found["unread"] == sum(not by_id[m]["read"] for m in wanted), filters


# ---- the commands

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    made = Two(tmp_path_factory.mktemp("truth"))
    yield made
    made.close()


@pytest.fixture
def proxy(two, tmp_path_factory):
    made = Proxy(two.ada, tmp_path_factory.mktemp("p"))
    yield made
    made.close()


def state_of(two, message_id):
    return two.ada.json("trace", message_id)["recipients"][0]


def unread(two):
    """What bob has not read, without showing it to anybody."""
    with two.ada.client() as client:
        found = client.call("message.list", for_agent="bob", caller_agent_id="bob", unread=True)
    return [message["body"]["content"] for message in found["messages"]]


def trace(two, message_id):
    """What `trace` prints, without the breaks of its lines."""
    return " ".join(two.ada.ok("trace", message_id).split())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["O", "A"])
@pytest.mark.parametrize("words", [("wait", "--timeout", "60s"), ("inbox", "--unread"), ("inbox",), ("wait", "--unread", "--json")])
def test_a_command_that_died_before_it_printed_claims_nothing(two, proxy, words, kind):
    """The line is cut before the text came (O), or before the client has said that it is out (A)."""
    two.clear()
    if words[0] == "inbox" or "--unread" in words:
        sent = two.mail("unseen")
    died = threading.Event()
    proxy.cut = lambda number, side, what: what == kind and side == ("daemon" if kind == "O" else "client")

    def die():
        process.kill()
        died.set()
    proxy.on_cut = die
    process = start(two.bob, *words, env=proxy.env())
    if words[0] == "wait" and "--unread" not in words:
        proxy.await_record("S")
        sent = two.mail("unseen")
    assert died.wait(END_S)
    process.communicate()
    assert state_of(two, sent)["state"] == "delivered"
    assert unread(two) == ["unseen"]
    # and one that lives says it
    proxy.cut = lambda number, side, what: False
    status, out, _ = finish(start(two.bob, *([*words, "--unread"] if words[0] == "wait" and "--unread" not in words else words),
                                  env=proxy.env()))
    assert status == 0 and sent in out
    assert state_of(two, sent)["state"] == ("read" if words == ("inbox",) else "pushed" if words[0] == "wait" else "seen")
    assert state_of(two, sent).get("route", "") == ("wait" if words[0] == "wait" else "")


@pytest.mark.slow
def test_what_sent_and_trace_print(two):
    two.clear()
    sent = two.mail("parser")
    assert "@bob(delivered)" in two.ada.ok("sent", "--limit", "1") and "- @bob (delivered)" in two.ada.ok("sent", "show", sent)
    assert re.search(r"@bob stored \d\d:\d\d", trace(two, sent))
    two.bob.ok("wait", "--unread")
    assert "@bob(pushed)" in two.ada.ok("sent", "--limit", "1") and "- @bob (pushed)" in two.ada.ok("sent", "show", sent)
    assert re.search(r"stored \S+.* → pushed \S+.* by wait", trace(two, sent))
    two.bob.ok("inbox", "--unread")
    assert "@bob(seen)" in two.ada.ok("sent", "--limit", "1")
    assert re.search(r"stored .* → pushed .* by wait → shown ", trace(two, sent))
    two.bob.ok("inbox")
    assert "@bob(read)" in two.ada.ok("sent", "--limit", "1") and "1/1 read" in two.ada.ok("sent", "--limit", "1")
    two.bob.ok("reply", sent, "yes")
    assert "@bob(answered)" in two.ada.ok("sent", "--limit", "1")
    assert re.search(r"@bob stored \S+ → pushed \S+ by wait → shown \S+ → read \S+ → answered \S+$", trace(two, sent))
    assert two.ada.ok("sent", "--overdue") == "No overdue messages.\n"
    for args in (("trace", "msg_nowhere"), ("sent", "show", "msg_nowhere")):
        failed = two.ada.run(*args)
        assert failed.returncode == 1 and "message not found: msg_nowhere" in failed.stderr
    mine = two.mail("mine", sender=two.bob, to="@ada")
    assert "was not authored by the current agent" in two.ada.run("sent", "show", mine).stderr


@pytest.mark.slow
def test_overdue_mail_is_told_by_sent_and_inbox(two):
    """A reader that was deleted: overdue at once, and `gone`."""
    two.clear()
    other = {"THRUM_NAME": "zoe"}
    two.bob.join("zoe", "reviewer", "zoe", env=other)
    sent = two.mail("for zoe", to="@zoe")
    two.ada.ok("agent", "delete", "zoe", "--force")
    out = two.ada.ok("sent", "--overdue")
    assert sent in out and "@zoe(delivered, gone)" in out
    assert re.search(r"\n?1 of the messages that you sent waits? too long: \S*thrum sent --overdue\n$", two.ada.ok("inbox"))
    assert "GONE" in trace(two, sent)
    assert two.ada.json("inbox")["overdue"] == 1
    assert "wait too long" not in two.bob.ok("inbox")
    two.ada.ok("message", "delete", sent, "--force")
    assert "too long" not in two.ada.ok("inbox")


@pytest.mark.slow
def test_if_last_on_the_command_line(two):
    two.clear()
    lone = two.mail("question")
    answer = two.bob.json("reply", lone, "yes")["message_id"]
    failed = two.ada.run("send", "late", "--to", "@bob", "--if-last", lone)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == f"Error: the thread has moved on: @bob wrote {answer} after {lone}; read it, then send again with " \
                            f"--if-last {answer}\n"
    failed = two.ada.run("reply", lone, "late", "--if-last", lone)
    assert failed.returncode == 1 and answer in failed.stderr
    assert two.ada.json("reply", answer, "thanks", "--if-last", answer)["thread_id"] == "thr_" + lone[4:]
    assert "message not found: msg_x" in two.ada.run("send", "x", "--to", "@bob", "--if-last", "msg_x").stderr
    with two.ada.client() as client, pytest.raises(thrum.ThrumError) as caught:
        client.call("message.send", content="late", mentions=["@bob"], caller_agent_id="ada", if_last=lone)
    assert caught.value.data["newer"]["body"]["content"] == "thanks"


@pytest.mark.slow
def test_the_same_key_from_many_at_once_sends_once(two):
    two.clear()
    processes = [start(two.ada, "send", "once", "--to", "@bob", "--key", "race", "--json") for _ in range(8)]
    done = [finish(process) for process in processes]
    assert [status for status, _, _ in done] == [0] * 8
    assert len({json.loads(out)["message_id"] for _, out, _ in done}) == 1
    assert unread(two) == ["once"]
    two.ada.kill()
    assert two.ada.json("send", "once", "--to", "@bob", "--key", "race")["repeated"] is True
    assert two.bob.json("send", "mine", "--to", "@ada", "--key", "race").get("repeated") is None


@pytest.mark.slow
def test_of_many_conditional_sends_at_once_exactly_one_wins(two):
    two.clear()
    lone = two.mail("question", sender=two.bob, to="@ada")
    processes = [start(repo, "send", "mine", "--to", "@everyone", "--if-last", lone, "--json", stderr=subprocess.PIPE)
                 for repo in (two.ada, two.bob) * 4]
    done = [finish(process) for process in processes]
    (winner,) = [json.loads(out)["message_id"] for status, out, _ in done if status == 0]
    losers = [err for status, _, err in done if status]
    assert len(losers) == 7 and all(f"wrote {winner} after {lone}" in err for err in losers)


@pytest.mark.slow
def test_history_on_the_command_line(two):
    sent = two.mail("one")
    assert "Version" not in two.ada.ok("message", "get", sent, "--history")
    two.ada.ok("message", "edit", sent, "two \x1b[2Jx")
    out = two.ada.ok("message", "get", sent, "--history")
    assert out.index("\none\n") < out.index("two ") and "by @ada" in out and "\x1b" not in out
    versions = two.ada.json("message", "get", sent, "--history")["message"]["history"]
    assert [v["body"]["content"] for v in versions] == ["one", "two \x1b[2Jx"]
    two.ada.ok("message", "delete", sent, "--force")
    out = two.ada.ok("message", "get", sent, "--history")
    assert "DELETED" in out and "\none\n" in out


@pytest.mark.slow
def test_filters_and_footers_on_the_command_line(two):
    two.clear()
    bob = two.bob
    base = bob.json("inbox", "--limit", "1")["total"]
    for number in range(3):
        two.mail(f"core {number}", None, "@bob", "--scope", "module:core")
    two.mail("wide", None, "@everyone")
    total = base + 4
    out = bob.ok("inbox", "--scope", "module:core", "--unread", "--limit", "2")
    assert out.endswith("\nShowing 1-2 of 3 messages (3 unread) (filtered for @bob); 1 more hidden by the filter scope=module:core\n")
    out = bob.ok("inbox", "--scope", "module:web")
    assert out == f"No messages matching filter --scope module:web\nShowing 0 of {total} total messages (filter: scope=module:web)\n"
    found = bob.json("inbox", "--scope", "module:web")
    assert (found["messages"], found["total"], found["hidden"]) == ([], 0, total)
    assert bob.json("inbox", "--from", "@ada", "--unread")["hidden"] == 0
    assert "hidden" not in bob.json("inbox", "--unread")
    out = bob.ok("inbox", "--from", "@nobody", "--mentions", "--unread")
    assert out == "No messages matching filter --from @nobody --mentions\n" \
                  "Showing 0 of 4 total messages (filter: from=@nobody, mentions)\n"
    named = bob.json("inbox", "--mentions", "--unread", "--limit", "100")
    assert named["total"] == 3 and named["hidden"] == 1 and "wide" not in [m["body"]["content"] for m in named["messages"]]
    oldest = [m["message_id"] for m in bob.json("inbox", "--oldest", "--unread", "--limit", "100")["messages"]]
    newest = [m["message_id"] for m in bob.json("inbox", "--unread", "--limit", "100")["messages"]]
    assert oldest == newest[::-1] and len(newest) == 4
    assert "scope must be in 'type:value' format, got: nope" in bob.run("inbox", "--scope", "nope").stderr
    assert bob.ok("inbox", "--page", "99") == f"No messages on page 99; there are {-(-total // 10)} pages.\n"
    bob.ok("inbox", "--scope", "module:core")
    assert unread(two) == ["wide"], "only what was shown is read"
    bob.ok("inbox")
    assert bob.ok("inbox", "--unread") == "No unread messages for @bob.\n"


@pytest.mark.slow
def test_read_all_on_the_command_line(two):
    two.clear()
    assert two.bob.ok("message", "read", "--all") == "No unread messages.\n"
    two.mail("one")
    assert two.bob.ok("message", "read", "--all") == "✓ Marked 1 message as read\n"
    two.mail("two")
    two.mail("three")
    assert two.bob.ok("message", "read", "--all") == "✓ Marked 2 messages as read\n"
    assert two.bob.json("message", "read", "--all")["marked_count"] == 0
    assert "requires at least 1 arg(s) or --all flag" in two.bob.run("message", "read").stderr
