"""What is removed is gone: purge, archive, bulk deletion, deletion of groups and agents.

After each of them the removed texts are in no file, all that is left answers as before, a rebuild from any of the
files agrees, and whatever a crash or a full disk interrupts is finished later.
"""

import contextlib
import errno
import json
import logging
import os
import random
import re
import shutil
import sqlite3
import threading
import time

import pytest

import thrum
from conftest import FakeWorld
from generate import START, answers, difference, fill, history, places_in
from team import finish, start
from test_ledger import branch_ids, crash, journal_events, shared_ids
from test_methods import Team

DAY = 86_400 * thrum.NS
PEOPLE = ("ada", "bob", "cy")


class Stop(BaseException):
    """The process ends here."""


class Office(Team):
    """Three agents with history: every message has a word of its own, which says what it is."""

    def __init__(self, top):
        self.made, self.texts, self.count = [], {}, 0       # events; message id -> its words; how many words there were
        super().__init__(top)

    def call(self, method, **params):
        reply = super().call(method, **params)
        if thrum.METHODS[method].writes:
            self.made += [event for _, event in self.events]
        return reply

    def write(self, who, *to, **more):
        """Send a message with a word that no other has; its id."""
        self.count += 1
        word = f"quokka{self.count:04}x"
        sent = self.send(who, f"the {word} is here", mentions=["@" + name for name in to], **more)
        self.texts[sent["message_id"]] = [word]
        return sent["message_id"]

    def edit(self, message_id):
        self.count += 1
        word = f"quokka{self.count:04}x"
        self.call("message.edit", message_id=message_id, content=f"now {word}")
        self.texts[message_id].append(word)

    def fill(self):
        """A week of old messages, a gap, a day of new ones: of each kind one."""
        for name in PEOPLE:
            self.agent(name, "builder" if name == "cy" else "planner", module=name)
        self.call("group.create", name="team")
        for name in ("bob", "cy"):
            self.call("group.member.add", group="team", member_value=name)
        self.old = self._one_of_each()
        session = self.call("session.list", agent_id="cy")["sessions"][0]["session_id"]
        self.call("session.setIntent", session_id=session, intent="intent of old")
        self.call("session.setTask", session_id=session, current_task="t-1")
        self.call("message.markShown", message_ids=self.old[:3], route="inbox", caller_agent_id="cy")
        self.call("session.end", session_id=session)
        self.world.at += 10 * DAY
        self.middle = self.world.at
        self.world.at += 10 * DAY
        self.call("session.start", agent_id="cy")
        self.new = self._one_of_each()
        self.ledger.flush(sync=True)
        while self.ledger.restless():
            self.ledger.idle()

    def _one_of_each(self):
        direct = self.write("ada", "bob", scopes=[{"type": "topic", "value": "x"}], structured={"k": 1})
        reply = self.write("bob", "ada", reply_to=direct)
        group = self.write("ada", "team")
        wide = self.write("cy")
        both = self.write("bob", "ada", "cy", refs=[{"type": "pr", "value": "7"}])
        deleted = self.write("ada", "cy")
        grouped = self.write("cy", "team", scopes=[{"type": "topic", "value": "x"}])
        answer = self.write("ada", "cy", reply_to=wide)
        self.edit(direct)
        self.edit(direct)
        self.edit(wide)
        self.edit(group)
        self.call("message.delete", message_id=deleted)
        self.call("message.markRead", message_ids=[direct, group, wide], caller_agent_id="bob")
        self.call("message.markRead", message_ids=[reply], caller_agent_id="ada")
        return [direct, reply, group, wide, both, deleted, grouped, answer]

    def crash(self):
        self.reading.close()
        crash(self.ledger)

    def open(self):
        super().open()
        while self.ledger.restless():
            self.ledger.idle()

    def facts(self):
        """message id -> its event."""
        return {event["message_id"]: event for event in self.made if event["type"] == "message.create"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """An office that is made once, and closed: each test has a copy of its files."""
    made = Office(tmp_path_factory.mktemp("template"))
    made.fill()
    made.close()
    return made


def copied(office, tmp_path, name):
    """Another office with the same files."""
    top = tmp_path / name
    shutil.copytree(office.places.root, top, symlinks=True)
    other = Office.__new__(Office)
    other.__dict__.update({k: v for k, v in office.__dict__.items() if k not in ("ledger", "reading", "places", "world")})
    other.made, other.texts = list(office.made), dict(office.texts)
    other.world = FakeWorld(thrum.stamp_of(office.world.at))
    other.world.drawn = 1 << 50
    other.places = thrum.Places(str(top), str(top / ".thrum"), str(top / ".git"))
    other.open()
    return other


@pytest.fixture
def office(template, tmp_path):
    made = copied(template, tmp_path, "office")
    yield made
    with contextlib.suppress(Exception):
        made.close()


def leaks(places, words):
    """Where below `.thrum` (without the archive) and in the branch some words still are, in a line; "" when nowhere."""
    found = []
    for top in (places.thrum, places.sync):
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                if not os.path.isfile(path) or folder.endswith("/archive"):
                    continue
                try:
                    with open(path, "rb") as file:
                        data = file.read().lower()
                except FileNotFoundError:       # a daemon is at work here
                    continue
                held = [word for word in sorted(words) if word.encode() in data]
                if held:
                    found.append(f"{path[len(places.root) + 1:]}: {' '.join(held)}")
    return "; ".join(sorted(found))


def counts_by_hand(events, removed):
    """agent -> (inbox, unread, sent) by going through the events, without those of removed messages."""
    read = {(e["message_id"], e["agent_id"]) for e in events if e["type"] == "message.receipt" and e["receipt_type"] == "read"}
    deleted = {e["message_id"] for e in events if e["type"] == "message.delete"}
    found = {name: [0, 0, 0] for name in PEOPLE}
    for event in events:
        if event["type"] == "message.create" and event["message_id"] not in removed:
            found[event["agent_id"]][2] += 1            # what was deleted stays in `sent`
            for name in event.get("recipients", ()) if event["message_id"] not in deleted else ():
                found[name][0] += 1
                found[name][1] += (event["message_id"], name) not in read
    return {name: tuple(counts) for name, counts in found.items()}


def counts_of(team, names=PEOPLE):
    found = {}
    for name in names:
        inbox = team.call("message.list", for_agent=name, caller_agent_id=name)
        found[name] = inbox["total"], inbox["unread"], team.call("message.outbox", caller_agent_id=name)["total"]
        unread = team.call("message.list", for_agent=name, caller_agent_id=name, unread=True, page_size=100)
        assert len(unread["messages"]) == unread["total"] == inbox["unread"]
    return found


def numbers(team):
    return {row["message_id"]: row["seq"] for row in team.ledger.store.rows("select message_id, seq from messages")}


def removed_by(office, way):
    """The ids of the messages that a way of removing takes away."""
    facts = office.facts()

    def scoped(event, *pair):
        return pair in thrum.pairs_of(event.get("scopes"))
    tests = {
        "purge": lambda e: e["message_id"] in office.old, "purge all": lambda e: True,
        "archive agent": lambda e: e["agent_id"] == "ada", "archive group": lambda e: scoped(e, "group", "team"),
        "by scope": lambda e: scoped(e, "topic", "x"), "by agent": lambda e: e["agent_id"] == "bob",
        "group": lambda e: scoped(e, "group", "team"), "agent": lambda e: e["agent_id"] == "cy"}
    return {message_id for message_id, event in facts.items() if tests[way](event)}


WAYS = {
    "purge": lambda office: office.call("purge.execute", before=thrum.stamp_of(office.middle)),
    "purge all": lambda office: office.call("purge.execute", before="2100-01-01T00:00:00Z"),
    "archive agent": lambda office: office.call("message.archive", archive_type="agent", identifier="ada"),
    "archive group": lambda office: office.call("message.archive", archive_type="group", identifier="team"),
    "by scope": lambda office: office.call("message.deleteByScope", scope_type="topic", scope_value="x"),
    "by agent": lambda office: office.call("message.deleteByAgent", agent_id="bob"),
    "group": lambda office: office.call("group.delete", name="team", delete_messages=True),
    "agent": lambda office: office.call("agent.delete", name="cy"),
}


def words_of(office, ids):
    return [word for message_id in ids for word in office.texts[message_id]]


def check(office, gone, people, seqs=True):
    """Everything that must hold once the messages `gone` were removed, however the files came to be as they are."""
    kept = set(office.facts()) - gone
    assert leaks(office.places, words_of(office, gone)) == ""
    present = numbers(office)
    assert present.keys() == kept
    settle(office.ledger)           # a search sees everything that was said
    if seqs:
        assert present == {message_id: office.numbers[message_id] for message_id in kept}
    assert counts_of(office, people) == {name: counts for name, counts in counts_by_hand(office.made, gone).items() if name in people}
    office.ledger.flush(sync=True)
    assert branch_ids(office.places) == shared_ids(office.places)
    assert all(os.path.getsize(path) for path in thrum.log_files(office.places.sync) if not path.endswith("/events.jsonl"))
    for message_id in gone:
        office.refused("message.get", message_id=message_id)
    for message_id in kept:         # what is left is whole
        assert office.texts[message_id][-1] in office.get(message_id)["body"]["content"]
        assert office.call("message.search", query=office.texts[message_id][-1])["total"] == (not office.get(message_id)["deleted"])
    for word in words_of(office, gone):
        assert office.call("message.search", query=word)["total"] == 0


# ---- each way of removing

@pytest.mark.parametrize("way", WAYS)
def test_what_was_removed_is_in_no_file_and_never_comes_back(office, way):
    gone = removed_by(office, way)
    assert gone and (way == "purge all" or gone < set(office.facts()))
    present = leaks(office.places, words_of(office, gone))
    assert all(word in present for word in words_of(office, gone)), "or the test sees nothing"
    office.numbers = numbers(office)
    people = [name for name in PEOPLE if (way, name) != ("agent", "cy")]
    WAYS[way](office)
    check(office, gone, people)
    live = answers(office.ledger.store, office.made)
    office.close()
    office.open()
    check(office, gone, people)
    assert not difference(live, answers(office.ledger.store, office.made))
    office.crash()
    office.open()
    check(office, gone, people)
    assert not difference(live, answers(office.ledger.store, office.made))
    office.close()
    os.unlink(office.places.database)
    office.open()
    check(office, gone, people)
    assert not difference(live, answers(office.ledger.store, office.made))
    office.close()
    shutil.rmtree(office.places.journal)
    office.open()
    check(office, gone, people, seqs=False)
    office.close()
    shutil.rmtree(office.places.sync + "/messages")
    os.mkdir(office.places.sync + "/messages")
    os.unlink(office.places.sync + "/events.jsonl")
    office.open()
    check(office, gone, people, seqs=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_time_changes_nothing(office, way):
    WAYS[way](office)
    before, seq = answers(office.ledger.store, office.made), office.ledger.journal.last
    try:
        WAYS[way](office)
    except thrum.ThrumError as error:
        assert way in ("group", "agent") and "not found" in str(error)
        assert office.ledger.journal.last == seq
    if way.startswith("purge"):
        before.pop("cutoff")
    after = answers(office.ledger.store, office.made)
    assert not difference({**before, "cutoff": 0}, {**after, "cutoff": 0})


@pytest.mark.parametrize("way", WAYS)
def test_cursors_of_waiting_agents_stay_valid(office, way):
    """`wait --after-seq N` gives what came after N, whatever was removed, restarted or made anew in between."""
    gone = removed_by(office, way)
    reader = "bob" if way != "by agent" else "ada"
    seqs = sorted(numbers(office).values())
    wanted = {}
    for after in (0, seqs[0], seqs[len(seqs) // 2], seqs[-2], seqs[-1]):
        wanted[after] = [message_id for message_id, event in office.facts().items()
                         if message_id not in gone and numbers(office)[message_id] > after and reader in event.get("recipients", ())
                         and not office.get(message_id)["deleted"]]
    epoch = office.call("health")["epoch"]
    WAYS[way](office)

    def check_cursors():
        for after, ids in wanted.items():
            found = office.call("message.wait", caller_agent_id=reader, after_seq=after, epoch=epoch, page_size=100)
            assert [m["message_id"] for m in (found or {"messages": []})["messages"]] == ids, after
    check_cursors()
    office.crash()
    office.open()
    check_cursors()
    office.close()
    os.unlink(office.places.database)
    office.open()
    check_cursors()
    sent = office.send("ada" if reader == "bob" else "bob" if way != "by agent" else "cy", "after all", mentions=["@" + reader])
    found = office.call("message.wait", caller_agent_id=reader, after_seq=seqs[-1], epoch=epoch)
    assert [m["message_id"] for m in found["messages"]] == [sent["message_id"]]


# ---- purge

def test_a_dry_run_counts_what_is_then_removed(office):
    before = thrum.stamp_of(office.middle)
    session = office.call("session.list", agent_id="bob")["sessions"][0]["session_id"]
    office.call("session.setIntent", session_id=session, intent="an open session")
    lines = {e["event_id"] for e in journal_events(office.places)}
    preview = office.call("purge.execute", before=before, dry_run=True)
    assert {e["event_id"] for e in journal_events(office.places)} == lines and set(numbers(office)) == set(office.facts())
    assert preview["dry_run"] is True and preview["before"] == before
    done = office.call("purge.execute", before=before)
    assert {**preview, "dry_run": False} == done
    left = journal_events(office.places)
    gone = lines - {e["event_id"] for e in left}
    assert done["messages_deleted"] == len(office.old) and done["sessions_deleted"] == 1
    assert done["events_deleted"] == len(gone)
    assert done["sync_events_filtered"] == 2
    assert done["sync_message_files"] == 3
    after = office.call("purge.execute", before=before, dry_run=True)
    assert [after[k] for k in ("messages_deleted", "sessions_deleted", "events_deleted", "sync_message_files",
                               "sync_events_filtered")] == [0] * 5


def test_purge_leaves_agents_groups_and_open_sessions(office):
    def rest():
        sessions = office.call("session.list", active_only=True)["sessions"]
        return (sorted(a["agent_id"] for a in office.call("agent.list")["agents"]),
                sorted((g["name"], g["member_count"]) for g in office.call("group.list")["groups"]), [s["session_id"] for s in sessions])
    before = rest()
    assert len(before[2]) == 3
    office.call("purge.execute", before="2100-01-01T00:00:00Z")
    assert rest() == before
    assert len(office.call("session.list")["sessions"]) == 3, "the ended one has gone"
    assert numbers(office) == {}
    office.close()
    os.unlink(office.places.database)
    office.open()
    assert rest() == before
    assert office.write("ada", "bob") and counts_of(office)["bob"] == (1, 1, 0)


@pytest.mark.parametrize("way", ["purge", "purge all", "agent"])
def test_what_a_removed_session_was_for_goes_with_it(office, way):
    assert "1.jsonl: intent of old" in leaks(office.places, ["intent of old"])
    WAYS[way](office)
    assert leaks(office.places, ["intent of old"]) == ""
    office.close()
    os.unlink(office.places.database)
    office.open()
    assert leaks(office.places, ["intent of old"]) == ""


@pytest.mark.parametrize("when", ["before", "after"])
def test_work_contexts_of_a_purged_session_go_with_it(office, when):
    """Another program writes intents as `agent.update`; one that comes after the purge must not wait for its session for ever."""
    base = {"agent_id": "bob", "origin_daemon": "d_elsewhere", "v": 1}
    at = office.middle - DAY
    session = [{**base, "type": "agent.session.start", "session_id": "ses_far", "timestamp": thrum.stamp_of(at), "event_id": "evt_s"},
               {"type": "agent.session.end", "session_id": "ses_far", "timestamp": thrum.stamp_of(at + 100), "event_id": "evt_e"}]
    update = {**base, "type": "agent.update", "timestamp": thrum.stamp_of(at + 50), "event_id": "evt_u", "work_contexts": [
        {"session_id": "ses_far", "intent": "numbat01x", "intent_updated_at": thrum.stamp_of(at + 50), "branch": "numbat02x"}]}
    arrive(office.ledger, session + ([update] if when == "before" else []))
    WAYS["purge"](office)
    if when == "after":
        arrive(office.ledger, [update])
    settle(office.ledger)
    assert office.ledger.store.rows("select parent from pending") == []
    assert leaks(office.places, ["numbat01x", "numbat02x"]) == ""


def test_a_cutoff_in_the_future_is_cut_to_now(office):
    office.call("purge.execute", before="2100-01-01T00:00:00Z")
    event = office.made[-1]
    assert event["type"] == "purge.executed" and thrum.ns_of(event["cutoff"]) <= office.world.at
    assert thrum.ns_of(event["timestamp"]) >= thrum.ns_of(event["cutoff"])
    office.write("ada", "bob")
    assert counts_of(office)["bob"] == (1, 1, 0)


def test_the_cutoff_only_moves_forward(office):
    office.call("purge.execute", before=thrum.stamp_of(office.middle))
    office.call("purge.execute", before=thrum.stamp_of(office.middle - DAY))
    assert office.ledger.store.meta("purge_cutoff") == office.middle
    assert set(numbers(office)) == set(office.new)


@pytest.mark.parametrize("before, problem", [
    ("yesterday", 'invalid before timestamp "yesterday": must be RFC 3339'),
    ("", 'before is required'), ("2026-02-31T00:00:00Z", "must be RFC 3339"), ("x" * 5000, "must be RFC 3339")])
def test_a_purge_that_is_refused(office, before, problem):
    error = office.refused("purge.execute", before=before)
    assert problem in str(error) and len(str(error)) < 200


def test_exactly_at_the_cutoff_stays(office):
    message = office.get(office.new[0])
    office.call("purge.execute", before=message["created_at"])
    assert set(numbers(office)) == set(office.new)
    office.call("purge.execute", before=thrum.stamp_of(thrum.ns_of(message["created_at"]) + 1))
    assert set(numbers(office)) == set(office.new[1:])


def test_a_reply_and_its_thread_outlive_a_purged_parent(office):
    direct, reply = office.new[:2]
    thread = office.get(reply)["thread_id"]
    office.call("purge.execute", before=thrum.stamp_of(thrum.ns_of(office.get(direct)["created_at"]) + 1))
    assert office.get(reply)["thread_id"] == thread and office.get(reply)["reply_to"] == direct
    more = office.send("ada", "on", thread_id=thread, mentions=["@bob"])
    assert more["thread_id"] == thread
    live = answers(office.ledger.store, office.made)
    office.close()
    os.unlink(office.places.database)
    office.open()
    assert not difference(live, answers(office.ledger.store, office.made))


def test_an_author_with_many_files_leaves_none(office, monkeypatch):
    """A messages file that was emptied is gone: of one file, two, three, eleven."""
    monkeypatch.setattr(thrum, "BRANCH_FILE_MAX", 2_000)
    for _ in range(60):
        office.write("bob", "ada")
        office.ledger.flush()
    assert len(office.ledger.branch.files("messages/bob")) > 10
    office.call("message.deleteByAgent", agent_id="bob")
    assert not [name for name in os.listdir(office.places.sync + "/messages") if name.startswith("bob")]
    again = office.write("bob", "ada")
    office.ledger.flush(sync=True)
    assert os.path.getsize(office.places.sync + "/messages/bob.jsonl")
    office.close()
    shutil.rmtree(office.places.journal)
    office.open()
    assert again in numbers(office)


def test_a_file_in_the_middle_that_was_emptied_hides_nothing(office, monkeypatch):
    monkeypatch.setattr(thrum, "BRANCH_FILE_MAX", 2_000)
    ids = []

    def write(count):
        for _ in range(count):
            ids.append(office.write("bob", "ada"))
            office.ledger.flush()
    write(8)
    office.world.at += DAY
    cutoff = office.world.at
    write(8)
    office.call("purge.execute", before=thrum.stamp_of(cutoff))
    write(8)
    office.ledger.flush(sync=True)
    assert branch_ids(office.places) == shared_ids(office.places)
    office.close()
    shutil.rmtree(office.places.journal)
    office.open()
    assert set(numbers(office)) == set(ids[8:])


# ---- archive

def archived(path):
    with open(path, "rb") as file:
        return [json.loads(line) for line in file.read().split(b"\n")[:-1]]


@pytest.mark.parametrize("kind, name, way", [("agent", "ada", "archive agent"), ("group", "team", "archive group")])
def test_an_archive_holds_all_that_was_known(office, kind, name, way):
    gone = removed_by(office, way)
    whole = {message_id: office.call("message.get", message_id=message_id, history=True)["message"] for message_id in gone}
    done = office.call("message.archive", archive_type=kind, identifier=name)
    assert done == {"archived_count": len(gone), "archive_path": f"{office.places.thrum}/archive/{name}.jsonl"}
    lines = archived(done["archive_path"])
    assert [line["message_id"] for line in lines] == sorted(gone, key=lambda message_id: whole[message_id]["created_at"])
    for line in lines:
        assert {**whole[line["message_id"]], "agent_id": whole[line["message_id"]]["author"]["agent_id"]} == line
        assert line["agent_id"] and line["created_at"] and line["body"]["content"] and "scopes" in line and "refs" in line
    edited = [line for line in lines if "history" in line]
    assert edited and all(line["history"][-1]["body"]["content"] == line["body"]["content"] for line in edited)
    assert os.stat(done["archive_path"]).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(done["archive_path"])).st_mode & 0o077 == 0
    assert [e["type"] for e in (event for _, event in office.events)] == ["message.remove"]
    # a second archive is added to the first
    if kind == "agent":
        more = office.write("ada", "bob")
        assert office.call("message.archive", archive_type="agent", identifier="@ada")["archived_count"] == 1
        assert [line["message_id"] for line in archived(done["archive_path"])][len(lines):] == [more]
    size = os.path.getsize(done["archive_path"])
    assert office.call("message.archive", archive_type=kind, identifier=name)["archived_count"] == 0
    assert os.path.getsize(done["archive_path"]) == size


def test_an_archive_without_messages_makes_no_file(office):
    done = office.call("message.archive", archive_type="agent", identifier="nobody")
    assert done["archived_count"] == 0 and not os.path.exists(done["archive_path"])
    assert office.events == []


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "x" * 300, "@", "~root", "\ud800"])
@pytest.mark.parametrize("kind", ["agent", "group"])
def test_no_identifier_leads_out_of_the_archive(office, kind, name):
    before = set(office_files(office))
    try:
        done = office.call("message.archive", archive_type=kind, identifier=name)
    except thrum.ThrumError as error:
        assert len(str(error)) < 200 and "\n" not in str(error)
    else:
        assert done["archived_count"] == 0
        path = os.path.realpath(done["archive_path"])
        assert os.path.dirname(path) == os.path.realpath(office.places.thrum) + "/archive"
    assert set(office_files(office)) == before
    assert set(numbers(office)) == set(office.facts())


def office_files(office):
    return [os.path.join(folder, name) for folder, _, names in os.walk(office.places.root) for name in names]


@pytest.mark.parametrize("params, problem", [
    ({"archive_type": "agents", "identifier": "ada"}, 'invalid archive_type: "agents" (must be "agent" or "group")'),
    ({"archive_type": "", "identifier": "ada"}, 'invalid archive_type: "" (must be "agent" or "group")'),
    ({"identifier": "ada"}, 'invalid archive_type: "" (must be "agent" or "group")'),
    ({"archive_type": "agent"}, "identifier is required"), ({"archive_type": "agent", "identifier": ""}, "identifier is required")])
def test_an_archive_that_is_refused(office, params, problem):
    assert str(office.refused("message.archive", **params)) == problem


def test_an_archive_that_cannot_be_written_removes_nothing(office):
    with open(office.places.thrum + "/archive", "w"):
        pass
    error = office.refused("message.archive", archive_type="agent", identifier="ada")
    assert str(error).startswith("cannot archive: ") and len(str(error)) < 300
    assert set(numbers(office)) == set(office.facts())


def test_an_archive_in_a_batch_that_is_carried_out_again_has_each_message_once(office):
    """Another request of the same batch fails after it has changed something, and the whole batch begins again."""
    archive = thrum.METHODS["message.archive"].handler

    def fails(context):
        context.append("group.create", group_id="grp_x", name="x")
        raise thrum.ThrumError("no")
    outcomes, _ = office.ledger.commit([lambda context: archive(context, {"archive_type": "agent", "identifier": "ada"}), fails])
    assert str(outcomes[1]) == "no"
    ids = [line["message_id"] for line in archived(outcomes[0]["archive_path"])]
    assert len(ids) == outcomes[0]["archived_count"] and len(set(ids)) == len(ids)


def test_an_archive_whose_removal_could_not_be_stored(office, monkeypatch):
    """The disk is full when the event is to be written: the messages stay, and a second call archives each at least once."""
    gone = removed_by(office, "archive agent")

    def append(lines):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(office.ledger.journal, "append", append)
    error = office.refused("message.archive", archive_type="agent", identifier="ada")
    assert "No space left" in str(error) and set(numbers(office)) == set(office.facts())
    monkeypatch.undo()
    done = office.call("message.archive", archive_type="agent", identifier="ada")
    assert done["archived_count"] == len(gone) and {line["message_id"] for line in archived(done["archive_path"])} == gone


def test_an_archive_through_a_link_does_not_write_elsewhere(office, tmp_path):
    """`.thrum/archive/ada.jsonl` as a link to a file outside: nothing of it may be changed."""
    outside = tmp_path / "outside.txt"
    outside.write_text("mine\n")
    outside.chmod(0o644)
    os.makedirs(office.places.thrum + "/archive")
    os.symlink(outside, office.places.thrum + "/archive/ada.jsonl")
    with contextlib.suppress(thrum.ThrumError):
        office.call("message.archive", archive_type="agent", identifier="ada")
    assert outside.read_text() == "mine\n" and outside.stat().st_mode & 0o777 == 0o644


# ---- bulk deletion

@pytest.mark.parametrize("params", [{}, {"scope_type": "topic"}, {"scope_value": "x"}, {"scope_type": "", "scope_value": "x"}])
def test_delete_by_scope_wants_both_halves(office, params):
    assert str(office.refused("message.deleteByScope", **params)) == "scope_type and scope_value are required"


def test_delete_by_agent_wants_one(office):
    assert "agent_id is required" in str(office.refused("message.deleteByAgent"))


def test_bulk_deletion_counts_and_is_an_event(office):
    assert office.call("message.deleteByScope", scope_type="topic", scope_value="x", caller_agent_id="ada") == {"deleted_count": 4}
    (event,) = [event for _, event in office.events]
    assert event["type"] == "message.remove" and len(event["message_ids"]) == 4 and event["removed_by"] == "ada"
    assert event["event_id"] in branch_ids(office.places)
    assert office.call("message.deleteByScope", scope_type="topic", scope_value="x") == {"deleted_count": 0}
    assert office.events == []
    assert office.call("message.deleteByAgent", agent_id="nobody") == {"deleted_count": 0}
    assert office.call("message.deleteByScope", scope_type="topic", scope_value="X' or 1=1 --") == {"deleted_count": 0}


@pytest.mark.parametrize("deleted", [False, True])
def test_an_agent_whose_messages_are_ahead_of_the_clock(office, deleted):
    """They came from a machine whose clock is fast; with the agent they go all the same, deleted ones too."""
    ahead = office.world.at + DAY
    arrive(office.ledger, [elsewhere(ahead), elsewhere(ahead + 100, "msg_later", agent_id="bob", recipients=["ada"])])
    if deleted:
        arrive(office.ledger, about(office, "msg_late", ahead)[2:])
    office.call("agent.delete", name="ada")
    settle(office.ledger)
    office.refused("message.get", message_id="msg_late")
    assert office.get("msg_later")["body"]["content"] and not office.ledger.store.agent("ada")
    events = {event["event_id"] for event in journal_events(office.places)}
    assert "evt_msg_late" not in events and "evt_msg_later" in events


def test_group_delete_without_delete_messages_keeps_them(office):
    office.call("group.delete", name="team")
    assert set(numbers(office)) == set(office.facts())
    assert counts_of(office) == counts_by_hand(office.made, set())


def test_many_messages_need_several_events(office, monkeypatch):
    monkeypatch.setattr(thrum, "REMOVE_BYTES", 70)        # the third id is beyond
    count = sum(e["agent_id"] == "ada" for e in office.facts().values())
    assert office.call("message.deleteByAgent", agent_id="ada") == {"deleted_count": count}
    assert [len(event["message_ids"]) for _, event in office.events] == [3] * (count // 3) + [count % 3] * bool(count % 3)


def test_what_one_call_does_not_take_the_next_does(office, monkeypatch):
    monkeypatch.setattr(thrum, "REMOVE_MAX", 3)
    count, counts = sum(e["agent_id"] == "ada" for e in office.facts().values()), []
    while not counts or counts[-1]:
        counts.append(office.call("message.deleteByAgent", agent_id="ada")["deleted_count"])
    assert sum(counts) == count and counts[0] == 3
    # an archive too: nothing is lost between the calls
    count, counts = sum(e["agent_id"] == "cy" for e in office.facts().values()), []
    while not counts or counts[-1]:
        done = office.call("message.archive", archive_type="agent", identifier="cy")
        counts.append(done["archived_count"])
    assert sum(counts) == count == len(archived(done["archive_path"]))


@pytest.mark.parametrize("character", ["z", "€", "<", "🦊"])
def test_no_line_of_a_removal_is_too_long(office, character):
    """Ids of other programs may be longer than ours and hold any printable character."""
    long = [{"type": "message.create", "message_id": f"m{n:04}" + character * 240, "agent_id": "ada", "body": {"content": "x"},
             "recipients": ["bob"], "timestamp": thrum.stamp_of(office.world.at + n * 10 + 1), "event_id": f"evt_long{n:04}"}
            for n in range(400)]
    arrive(office.ledger, long)
    office.call("message.deleteByAgent", agent_id="ada")
    assert not office.ledger.store.rows("select m.seq from messages m join agents a on a.agent = m.author where agent_id = 'ada'")


# ---- what arrives late

def arrive(ledger, events):
    """Take in events of another machine, as a merge of its branch does: those that are not there yet."""
    lines = []
    known = ledger.store.known_events([e["event_id"] for e in events]) if len(events) <= 400 else set().union(*(
        ledger.store.known_events([e["event_id"] for e in events[i:i + 400]]) for i in range(0, len(events), 400)))
    lines = [thrum.canonical(event) for event in events if event["event_id"] not in known]
    if lines:
        before = ledger.journal.last
        ledger.journal.append(lines)
        ledger._project_from(before)
        ledger.export += [(stem, line) for line in lines if (stem := ledger._stem(json.loads(line)))]
    ledger.untidy = ledger.store.is_untidy()


def settle(ledger):
    while ledger.restless():
        ledger.idle()


def about(office, message_id, at, n=0):
    """A receipt, an edit and a deletion of a message, made elsewhere."""
    base = {"message_id": message_id, "origin_daemon": "d_elsewhere", "v": 1}
    return [{**base, "type": "message.edit", "agent_id": "ada", "body": {"format": "plain", "content": "now wombat01x"},
             "timestamp": thrum.stamp_of(at + 1), "event_id": f"evt_{message_id}e{n}"},
            {**base, "type": "message.receipt", "agent_id": "bob", "receipt_type": "read", "timestamp": thrum.stamp_of(at + 11),
             "event_id": f"evt_{message_id}r{n}"},
            {**base, "type": "message.delete", "timestamp": thrum.stamp_of(at + 21), "event_id": f"evt_{message_id}d{n}"}]


def elsewhere(at, name="msg_late", **more):
    return {"type": "message.create", "message_id": name, "agent_id": "ada", "body": {"format": "plain", "content": "a wombat00x"},
            "recipients": ["bob"], "refs": [{"type": "mention", "value": "bob"}], "origin_daemon": "d_elsewhere", "v": 1,
            "timestamp": thrum.stamp_of(at), "event_id": "evt_" + name, **more}


@pytest.mark.parametrize("order", ["create first", "create last", "one by one", "about first, then purge"])
@pytest.mark.parametrize("removal", ["purge", "remove", "agent"])
def test_what_arrives_after_its_removal_is_not_kept(office, order, removal):
    """A machine that was offline brings a message that was removed meanwhile, with edits, receipts and deletion."""
    at = office.middle - DAY
    create, rest = elsewhere(at), about(office, "msg_late", at)

    def take_away():
        if removal == "purge":
            office.call("purge.execute", before=thrum.stamp_of(office.middle))
        elif removal == "agent":
            office.call("agent.delete", name="ada")
        else:
            arrive(office.ledger, [{"type": "message.remove", "message_ids": ["msg_late"], "timestamp": thrum.stamp_of(office.world.at),
                                    "event_id": "evt_removal", "origin_daemon": "d_elsewhere", "v": 1}])
    if order == "about first, then purge":
        arrive(office.ledger, rest)
    take_away()
    if order in ("create last", "about first, then purge"):
        arrive(office.ledger, rest)
        settle(office.ledger)
        arrive(office.ledger, [create])
    elif order == "create first":
        arrive(office.ledger, [create, *rest])
    else:
        for event in (create, *rest):
            arrive(office.ledger, [event])
            settle(office.ledger)
    settle(office.ledger)
    office.refused("message.get", message_id="msg_late")
    if removal != "agent":
        counts = counts_of(office)
        assert counts == counts_by_hand(office.made, set(office.old) if removal == "purge" else set())
    office.ledger.flush(sync=True)
    assert leaks(office.places, ["wombat00x", "wombat01x"]) == ""
    assert office.ledger.store.rows("select * from pending") == []
    assert branch_ids(office.places) == shared_ids(office.places)
    office.crash()
    os.unlink(office.places.database)
    office.open()
    office.refused("message.get", message_id="msg_late")
    assert leaks(office.places, ["wombat00x", "wombat01x"]) == ""


@pytest.mark.parametrize("way", ["purge", "by agent", "agent", "archive agent"])
def test_everything_comes_once_more_and_stays_away(office, way):
    """The branch of another machine that has not heard of the removal is merged again and again."""
    copy = list(thrum.read_log(office.places.sync))
    gone = removed_by(office, way)
    office.numbers = numbers(office)
    people = [name for name in PEOPLE if (way, name) != ("agent", "cy")]
    WAYS[way](office)
    live = answers(office.ledger.store, office.made)
    sizes = None
    for _ in range(3):
        arrive(office.ledger, copy)
        settle(office.ledger)
        check(office, gone, people)
        assert not difference(live, answers(office.ledger.store, office.made))
        present = branch_ids(office.places)
        assert sizes is None or present == sizes, "the files do not grow"
        assert office.ledger.store.rows("select parent, event_id from pending") == []
        sizes = present
    office.crash()
    os.unlink(office.places.database)
    office.open()
    check(office, gone, people)
    assert not difference(live, answers(office.ledger.store, office.made))


def test_events_of_a_newer_version_are_not_taken_for_removed_ones(office):
    """A receipt of a kind that is not known yet waits for its message like others; tidying must leave it."""
    late = {"type": "message.receipt", "message_id": "msg_not_yet", "agent_id": "bob", "receipt_type": "acknowledged",
            "timestamp": thrum.stamp_of(office.world.at), "event_id": "evt_newer", "origin_daemon": "d_elsewhere", "v": 2}
    arrive(office.ledger, [late])
    office.call("purge.execute", before=thrum.stamp_of(office.middle))
    settle(office.ledger)
    assert "evt_newer" in branch_ids(office.places) and "evt_newer" in shared_ids(office.places)


# ---- damage, crashes, full disks

def test_torn_lines_that_were_set_aside_go_too(office):
    """A power cut tears the end of a branch file; its text must not outlive the message among the bad lines."""
    message_id = office.new[0]
    office.crash()
    path = office.places.sync + "/messages/ada.jsonl"
    word = office.texts[office.facts() and [m for m, e in office.facts().items() if e["agent_id"] == "ada"][-1]][0]
    with open(path, "rb+") as file:
        lines = file.read().split(b"\n")
        end = max(i for i, line in enumerate(lines) if word.encode() in line)
        data = b"\n".join(lines[:end + 1])
        file.seek(0)
        file.truncate()
        file.write(data[:-30])
    office.open()
    office.call("message.deleteByAgent", agent_id="ada")
    settle(office.ledger)
    assert message_id not in numbers(office)
    assert leaks(office.places, words_of(office, removed_by(office, "archive agent"))) == ""


def test_a_journal_that_was_set_aside_goes_too(office):
    office.crash()
    with open(office.places.journal + "/1.jsonl", "rb+") as file:
        file.write(b"#")
    office.open()
    assert os.path.isdir(office.places.journal + ".damaged")
    office.numbers = numbers(office)
    WAYS["purge"](office)
    settle(office.ledger)
    check(office, removed_by(office, "purge"), PEOPLE)


@pytest.mark.parametrize("suffix", [".jsonl", ".new.tmp", "events.jsonl", "ada.jsonl"])
def test_temporary_files_of_a_crash_go_too(office, monkeypatch, suffix):
    """kill -9 while a file is replaced leaves the half of it; a later purge must not overlook it."""
    real = os.rename

    def dies(source, target, **more):
        if os.fspath(target).endswith(suffix):
            raise Stop
        return real(source, target, **more)
    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(Stop):
        WAYS["purge"](office)
    monkeypatch.undo()
    office.crash()
    left = [path for path in office_files(office) if path.endswith((".tmp", ".new"))]
    assert left
    for path in left:               # of a process with another number than this one
        os.rename(path, path.replace(str(os.getpid()), "99999"))
    office.open()
    WAYS["purge all"](office)
    settle(office.ledger)
    assert leaks(office.places, words_of(office, set(office.facts()))) == ""
    assert [path for path in office_files(office) if path.endswith((".tmp", ".new"))] == []


STEPS = (("thrum", "atomic_write"), ("os", "rename"), ("os", "unlink"), ("thrum", "durable_sync"), ("thrum", "sync_directory"),
         ("Store", "commit"), ("Store", "forget_events"), ("Store", "set_meta"), ("Store", "shrink"), ("Store", "checkpoint"))


class Fuse:
    """Counts steps of tidying, and raises at one of them, before or after it is done."""

    def __init__(self, monkeypatch, error, at=-1, after=False, only=None):
        self.count, self.active = 0, False
        for where, name in STEPS:
            if only and name not in only:
                continue
            owner = {"thrum": thrum, "os": os, "Store": thrum.Store}[where]
            real = getattr(owner, name)

            def step(*args, _real=real, _name=name, **more):
                if not self.active:
                    return _real(*args, **more)
                self.count += 1
                now = self.count - 1 == at
                if now and not after:
                    raise error(_name)
                try:
                    return _real(*args, **more)
                finally:
                    if now:
                        raise error(_name)
            monkeypatch.setattr(owner, name, step)
        tidy = thrum.Ledger.tidy

        def watched(ledger, *args, **more):
            self.active = True
            try:
                return tidy(ledger, *args, **more)
            finally:
                self.active = False
        monkeypatch.setattr(thrum.Ledger, "tidy", watched)


@pytest.fixture
def copy_of(template, tmp_path):
    made = []

    def make():
        made.append(copied(template, tmp_path, f"copy{len(made)}"))
        return made[-1]
    yield make
    for one in made:
        with contextlib.suppress(Exception):
            one.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("way", ["purge", "by agent"])
def test_a_crash_at_any_point_of_tidying_is_finished_later(copy_of, monkeypatch, way, after):
    office = copy_of()
    gone, first = removed_by(office, way), numbers(office)
    with monkeypatch.context() as patch:
        fuse = Fuse(patch, Stop)
        WAYS[way](office)
    live, steps = answers(office.ledger.store, office.made), fuse.count
    assert steps > 10
    problems = []
    for at in range(steps):
        office = copy_of()
        office.numbers = first
        with monkeypatch.context() as patch:
            Fuse(patch, Stop, at, after)
            with pytest.raises(Stop) as stopped:
                WAYS[way](office)
        office.crash()
        office.open()
        try:
            check(office, gone, PEOPLE)
            assert not difference(live, answers(office.ledger.store, office.made)), "answers differ"
        except AssertionError as error:
            problems.append(f"{'after' if after else 'before'} step {at} ({stopped.value}): {str(error)[:300]}")
        with contextlib.suppress(Exception):
            office.close()
        shutil.rmtree(office.places.root)
    assert not problems, "\n".join(problems)


def full(name):
    if name in ("commit", "forget_events", "set_meta", "shrink", "checkpoint"):
        return sqlite3.OperationalError("database or disk is full")
    return OSError(errno.ENOSPC, "No space left on device", name)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_full_disk_at_any_point_of_tidying(copy_of, monkeypatch, caplog, after):
    """The purge itself holds, what is sent then is kept, one line is logged, and the bytes are freed at the next start."""
    office = copy_of()
    gone, first = removed_by(office, "purge"), numbers(office)
    # a system call that fails has done nothing; what consists of several may have done some of them
    steps = ("atomic_write", "sync_directory", "shrink") if after else None
    with monkeypatch.context() as patch:
        fuse = Fuse(patch, full, only=steps)
        WAYS["purge"](office)
    count, problems = fuse.count, []
    assert count > 3
    for at in range(count):
        office = copy_of()
        office.numbers = dict(first)
        caplog.clear()
        at_step = ""
        with monkeypatch.context() as patch:
            names = []
            fuse = Fuse(patch, lambda name, names=names: names.append(name) or full(name), at, after, steps)
            try:
                done = WAYS["purge"](office)
                at_step = (names or ["?"])[0]
                assert done["messages_deleted"] == 8
                assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1, "one log line"
                line = caplog.records[0].getMessage()
                assert ("not freed" in line or "the branch files are behind" in line) and "\n" not in line
                assert office.inbox("bob", page_size=100), "it still answers"
                late = office.write("ada", "bob")
                office.numbers[late] = numbers(office)[late]
                settle(office.ledger)
                assert late in {e.get("message_id") for e in journal_events(office.places)}, "what was acknowledged is lost"
            except (AssertionError, OSError, sqlite3.Error, thrum.ThrumError) as error:
                problems.append(f"step {at} ({at_step or names}): {type(error).__name__} {str(error)[:200]}")
        office.crash()
        office.open()
        try:
            check(office, gone, PEOPLE)
        except AssertionError as error:
            problems.append(f"step {at} ({at_step}), later: {str(error)[:200]}")
        with contextlib.suppress(Exception):
            office.close()
        shutil.rmtree(office.places.root)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", ["rename", "sync_directory", "open"])
def test_an_error_while_the_journal_is_replaced_loses_nothing(office, monkeypatch, name):
    """The file has been replaced, but not everything after it worked: what is sent next must not go to the old file."""
    real_open, real_sync, failed = os.open, thrum.sync_directory, []

    def opened(path, flags, *args, **more):
        if name == "open" and not failed and str(path).startswith(office.places.journal) and flags & os.O_APPEND:
            failed.append(path)
            raise OSError(errno.EMFILE, "Too many open files", path)
        return real_open(path, flags, *args, **more)

    def synced(path):
        if name == "sync_directory" and not failed and path == office.places.journal:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error", path)
        return real_sync(path)

    def renamed(source, target):
        if name == "rename" and not failed and target.startswith(office.places.journal):
            failed.append(target)
            raise OSError(errno.EIO, "Input/output error", target)
        return os.replace(source, target)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(thrum, "sync_directory", synced)
    WAYS["purge"](office)
    assert failed
    late = office.write("ada", "bob")
    monkeypatch.undo()
    office.crash()
    office.open()
    assert late in numbers(office)
    gone = removed_by(office, "purge")
    assert leaks(office.places, words_of(office, gone)) == ""


def test_a_reader_in_the_middle_of_its_question_delays_the_freeing_but_does_not_prevent_it(office):
    """SQLite cannot empty its write-ahead log while a reader looks at an old snapshot."""
    reader = thrum.Store(office.places.database, office.world)
    reader.db.execute("begin")
    reader.db.execute("select count(*) from messages").fetchone()
    began = time.monotonic()
    WAYS["purge"](office)
    took = time.monotonic() - began
    assert reader.db.execute("select count(*) from messages").fetchone()[0] == len(office.facts()), "its snapshot"
    reader.db.execute("rollback")
    reader.close()
    office.call("session.heartbeat", session_id=office.call("session.list", active_only=True)["sessions"][0]["session_id"])
    settle(office.ledger)
    assert leaks(office.places, words_of(office, removed_by(office, "purge"))) == ""
    assert took < 8, "others waited for the reader"


# ---- any history

def more_tombstones(rng, events):
    """Some more removals of messages, agents and times that a history knows."""
    ids = [e["message_id"] for e in events if e["type"] == "message.create"]
    times = sorted(thrum.ns_of(e["timestamp"]) for e in events)
    made = []
    for number in range(rng.randrange(4)):
        at = rng.choice(times) + 7
        kind = rng.choice(thrum.TOMBSTONES)
        made.append({"type": kind, "timestamp": thrum.stamp_of(at), "event_id": f"evt_tomb{number}", "v": 1, "origin_daemon": "d_other",
                     **{"purge.executed": {"cutoff": thrum.stamp_of(rng.choice(times))},
                        "agent.cleanup": {"agent_id": rng.choice([e["agent_id"] for e in events if "agent_id" in e])},
                        "message.remove": {"message_ids": rng.sample(ids, min(len(ids), 3))}}[kind]})
    return made


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(24, 60))])
def test_tidying_changes_no_answer_whatever_the_order(tmp_path, seed):
    """Events of several machines, in any order and with repetitions, tidied up now and then; then made anew."""
    rng = random.Random(seed)
    events = [e for e in history(seed, 120) if e["type"] in thrum.EVENTS]
    events += more_tombstones(rng, events)
    if seed % 3:
        rng.shuffle(events)
    places = places_in(tmp_path)
    world = FakeWorld(thrum.stamp_of(START + 90 * DAY))
    ledger = thrum.Ledger(places, world)
    ledger.open()
    at = 0
    while at < len(events):
        step = rng.randrange(1, 20)
        arrive(ledger, events[at:at + step])
        at += step
        if rng.random() < 0.3:      # a merge brings again whatever the other side still has
            arrive(ledger, events[:at])
        if rng.random() < 0.3 and ledger.untidy:
            settle(ledger)
        if rng.random() < 0.05:
            crash(ledger)
            ledger = thrum.Ledger(places, world)
            ledger.open()
    settle(ledger)
    plain = places_in(tmp_path / "plain")
    store = thrum.Store(plain.database, FakeWorld(), writable=True)
    store.create()
    store.begin()
    made_here = {event["event_id"] for event in events}
    made_here = [event for event in journal_events(places) if event["event_id"] not in made_here]
    for number, event in enumerate(made_here + events, 1):
        store.apply(event, number, thrum.ns_of(event["timestamp"]))
    store.settle()
    store.commit()
    wanted = answers(store, events)
    store.close()
    found = answers(ledger.store, events)
    assert not (problem := difference(wanted, found)), f"untidied against tidied {problem}"
    ledger.flush(sync=True)
    assert branch_ids(places) == shared_ids(places)
    arrive(ledger, events)
    settle(ledger)
    assert not (problem := difference(wanted, answers(ledger.store, events))), f"after a repetition of all {problem}"
    crash(ledger)
    os.unlink(places.database)
    ledger = thrum.Ledger(places, world)
    ledger.open()
    settle(ledger)
    assert not (problem := difference(wanted, answers(ledger.store, events))), f"rebuilt {problem}"
    ledger.close()


# ---- speed

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    places = places_in(tmp_path_factory.mktemp("large"))
    fill(places, 20_000, agents=20, seed=1)
    return places


@pytest.mark.slow
def test_twenty_thousand_messages_are_purged_in_steps(large, tmp_path):
    """The purge and its tidying hold up other senders for no longer than a few seconds at a time."""
    ledger = thrum.Ledger(large, FakeWorld("2026-03-10T00:00:00Z"))
    ledger.open()
    settle(ledger)
    size = sum(map(os.path.getsize, [large.database, *thrum.log_files(large.journal), *thrum.log_files(large.sync)]))
    assert ledger.store.counts()["messages"] == 20_000
    method = thrum.METHODS["purge.execute"].handler
    began = time.monotonic()
    (done,), _ = ledger.commit([lambda context: method(context, {"before": "2026-03-01T00:00:00Z"})])
    first = time.monotonic() - began
    assert done["messages_deleted"] == 20_000
    longest, steps = 0, 0
    while ledger.restless():
        at = time.process_time()        # of this process: what else the machine does is not its doing
        ledger.idle()
        longest, steps = max(longest, time.process_time() - at), steps + 1
    took = time.monotonic() - began
    print(f"purge {first:.2f} s, {steps} steps of at most {longest:.2f} s, all {took:.2f} s")
    left = sum(map(os.path.getsize, [large.database, *thrum.log_files(large.journal), *thrum.log_files(large.sync)]))
    assert left < size / 10
    assert first < thrum.CALL_S, "its caller was told that the disk does not answer"
    assert longest < 3, "others waited for one step of tidying"
    ledger.close()


# ---- in a daemon

WAIT_S = 60         # seconds after which something that should have happened has not


def until(condition, what):
    end = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {WAIT_S} s"
        time.sleep(0.005)
    return value


def filled(repo, messages, monkeypatch, file_max):
    """A repository whose log holds so many messages of 20 agents before its daemon starts; two more agents are at work."""
    thrum.initialize(str(repo.path))
    repo.close()
    places = thrum.find_places(str(repo.path))
    for name in ("thrum.db", "messages.db", "messages.db-wal", "messages.db-shm", "clean.json"):
        thrum.remove(f"{places.var}/{name}")
    shutil.rmtree(places.journal, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(thrum, "JOURNAL_FILE_MAX", file_max)
        fill(places, messages, agents=20, seed=3, unread=1)
    (repo.var / "stopped").unlink(missing_ok=True)
    repo.ok("daemon", "start")
    with repo.client() as client:
        for name in ("ann", "ben"):
            client.call("agent.register", name=name, role="sender", module=name)
            client.call("session.start", agent_id=name)
    return places


@pytest.mark.slow
def test_others_are_served_while_twenty_thousand_messages_are_purged(repo, monkeypatch):
    filled(repo, 20_000, monkeypatch, thrum.JOURNAL_FILE_MAX)
    stop, latencies, sent, problems = threading.Event(), [], [], []

    def send():
        with repo.client() as client:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    sent.append(client.call("message.send", caller_agent_id="ann", content=f"wombat{len(sent)}x",
                                            mentions=["@ben"])["message_id"])
                except thrum.ThrumError as error:
                    problems.append(error)
                latencies.append(time.monotonic() - began)
    thread = threading.Thread(target=send)
    thread.start()
    until(lambda: len(sent) > 20, "the sender")
    with repo.client() as client:
        began = time.monotonic()
        done = client.call("purge.execute", before="2026-01-01T00:00:00Z")
        took = time.monotonic() - began
        assert done["messages_deleted"] == 20_000
        until(lambda: not leaks(thrum.find_places(str(repo.path)), ["parser is green"]), "the freeing of bytes")
        stop.set()
        thread.join(WAIT_S)
        assert not problems
        print(f"purge {took:.2f} s, {len(sent)} sends, the slowest {max(latencies):.2f} s")
        assert took < thrum.CALL_S and max(latencies) < thrum.CALL_S / 2
        inbox = client.call("message.list", for_agent="ben", caller_agent_id="ben")
        assert inbox["total"] == inbox["unread"] == len(sent) == client.call("health")["messages"]
    repo.kill()
    with repo.client() as client:
        assert client.call("health")["messages"] == len(sent)


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 4, 9, 100])
def test_a_daemon_that_is_killed_while_it_tidies_goes_on_after_its_next_start(repo, monkeypatch, files):
    """kill -9 when so many of the journal's files have been replaced (100: when the database is made smaller)."""
    places = filled(repo, 4_000, monkeypatch, 150_000)
    with repo.client() as client:
        kept = [client.call("message.send", caller_agent_id="ann", content="stay", mentions=["@ben"])["message_id"]]
    paths = thrum.log_files(places.journal)
    assert len(paths) > 10
    before = {path: os.stat(path).st_ino for path in paths}
    pid = repo.pid()

    def purge():
        with contextlib.suppress(thrum.ThrumError, OSError), repo.client() as client:
            client.call("purge.execute", before="2026-01-01T00:00:00Z")
    thread = threading.Thread(target=purge)
    thread.start()
    until(lambda: sum(os.stat(path).st_ino != before[path] for path in paths) >= min(files, len(paths) - 1), "the rewriting")
    os.kill(pid, 9)
    thread.join(WAIT_S)
    with repo.client() as client:
        assert client.call("health")["messages"] == 1
        kept.append(client.call("message.send", caller_agent_id="ann", content="stay", mentions=["@ben"])["message_id"])
        until(lambda: not leaks(places, ["parser is green"]), "the freeing of bytes")
        found = client.call("message.list", for_agent="ben", caller_agent_id="ben")
        assert [m["message_id"] for m in found["messages"]] == kept[::-1]
    repo.close()
    os.unlink(places.database)
    (repo.var / "stopped").unlink(missing_ok=True)
    with repo.client() as client:
        assert client.call("health")["messages"] == 2


@pytest.mark.slow
def test_purge_on_the_command_line(repo):
    """Preview, execution, words and errors of spec/cli.md 6.7; no identity is needed."""
    repo.ok("init")
    repo.join("ada", "planner")
    repo.join("bob", "implementer", "web")
    env = {"THRUM_NAME": "ada"}
    for number in range(3):
        repo.ok("send", f"m{number}", "--to", "@bob", env=env)
    nobody = {"THRUM_NAME": ""}
    preview = repo.ok("purge", "--all", env=nobody).splitlines()
    assert preview[0].startswith("Purge preview (before ") and preview[0].endswith("):")
    assert [line.split() for line in preview[1:4]] == [["Messages:", "3"], ["Sessions:", "0"], ["Events:", "3"]]
    assert preview[4].strip() == "Sync files: 1 message files, 0 events file"
    assert preview[5:] == ["Run with --confirm to execute."]
    done = repo.ok("purge", "--all", "--confirm", env=nobody).splitlines()
    assert done[0].startswith("Purged (before ")
    assert [line.split() for line in done[1:4]] == [[word, count, "deleted"] for word, count in (
        ("Messages:", "3"), ("Sessions:", "0"), ("Events:", "3"))]
    assert done[4].strip() == "Sync files: 1 message files, 0 events file filtered" and done[5].startswith("Done.")
    assert repo.json("inbox", env={"THRUM_NAME": "bob"})["total"] == 0
    assert repo.json("sent", env=env)["total"] == 0
    assert len(repo.json("agent", "list", env=env)["agents"]["agents"]) == 2
    for args, problem in (
            ((), "either --before or --all is required"), (("--before", "2d", "--all"), "--before and --all are mutually exclusive"),
            (("--before", "0d"), "invalid --before value: "), (("--before", "-2h"), "invalid --before value: duration must be positive"),
            (("--before", "soon"), "invalid --before value: unrecognized time specification")):
        failed = repo.run("purge", *args, "--confirm", env=nobody)
        assert failed.returncode == 1 and problem in failed.stderr and failed.stderr.count("\n") == 1 and not failed.stdout
    for spec in ("2d", "12h", "1h30m", "2020-03-15", "2020-03-15T00:00:00+02:00"):
        assert "preview" in repo.ok("purge", "--before", spec)
    assert repo.json("purge", "--all")["dry_run"] is True


@pytest.mark.slow
def test_a_wait_goes_on_over_a_purge(repo, monkeypatch):
    """An agent that waits, and one that comes back with an old number, get what is sent after the purge."""
    filled(repo, 300, monkeypatch, 20_000)
    with repo.client() as client:
        first = client.call("message.send", caller_agent_id="ann", content="before", mentions=["@ben"])
        repo.join("ben", "sender", "ben")
        waiting = start(repo, "wait", "--timeout", "60s", "--json")
        client.call("purge.execute", before="2026-01-01T00:00:00Z")
        until(lambda: waiting.poll() is not None or not client.call(        # again and again: when it begins nobody knows
            "message.send", caller_agent_id="ann", content="after", mentions=["@ben"]), "the waiting one")
        status, out, _ = finish(waiting)
        assert status == 0 and {m["body"]["content"] for m in json.loads(out)["messages"]} == {"after"}
        found = client.call("message.wait", caller_agent_id="ben", after_seq=first["seq"], timeout_ms=0)
        assert found["messages"][0]["body"]["content"] == "after" and found["messages"][0]["seq"] > first["seq"]
        assert client.call("message.get", message_id=first["message_id"])["message"]["seq"] == first["seq"]


@pytest.mark.slow
def test_the_sender_hears_that_nobody_has_been_there_for_long(repo, monkeypatch):
    """The warning of `send` for those who were last seen when the large log was written."""
    filled(repo, 50, monkeypatch, 20_000)
    repo.join("ann", "sender", "ann")
    done = repo.run("send", "are you there?", "--to", "@agent000", check=0)
    assert re.fullmatch(r"  warning: @agent000 was last seen \d+d(\d+h)? ago\n", done.stderr)
    done = repo.run("send", "anybody?", check=0)
    assert re.fullmatch(r"  warning: 20 of 21 recipients were not seen for 24 h: (@agent\d+, ){4}@agent\d+ and 15 more\n", done.stderr)
    assert repo.run("send", "hi", "--to", "@ben", check=0).stderr == ""
    assert repo.json("send", "hi", "--to", "@agent001")["warnings"]
