"""Section 10: the one way to change anything; what is left after errors, crashes and damage.

A crash is a ledger that is dropped without `close`; a rebuild is an `open` without a database.
"""

import errno
import itertools
import json
import os
import random
import shutil

import pytest

import thrum
from conftest import FakeWorld
from generate import START, answers, difference, fill, history, places_in

LOCAL = {kind for kind, row in thrum.EVENTS.items() if not row.shared}


DRAWS = itertools.count(1)
STARTED = []


@pytest.fixture(autouse=True)
def stop_all():
    """Close what a test has started and left."""
    yield
    while STARTED:
        crash(STARTED.pop())


def start(places, at=START):
    """A ledger of another process: its random numbers are others than those of the one before."""
    world = FakeWorld(thrum.stamp_of(at))
    world.drawn = next(DRAWS) << 40
    ledger = thrum.Ledger(places, world)
    STARTED.append(ledger)
    ledger.open()
    return ledger


def crash(ledger):
    """Leave the files as kill -9 does: no last flush, no mark of a clean stop."""
    if ledger.store:
        ledger.store.db.close()
    ledger.journal.close()


def request(event):
    """A request that makes an event with these fields."""
    def decide(context):
        fields = {k: v for k, v in event.items() if k not in (*thrum.COMMON_FIELDS, "v", "origin_daemon", "sequence")}
        return context.append(event["type"], **fields)
    return decide


def do(ledger, *events):
    """Carry out one batch that must succeed."""
    outcomes, made = ledger.commit([request(event) for event in events])
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [event for _, event in made]


def known(event):
    return event["type"] in thrum.EVENTS


def message(number, author="ada", to=("bob",), **more):
    return {"type": "message.create", "message_id": f"msg_{number:04}", "agent_id": author, "body": {"format": "plain",
    "content": f"m{number}"},
            "recipients": list(to), "refs": [{"type": "mention", "value": agent} for agent in to], **more}


def agents(*names):
    return [{"type": "agent.register", "agent_id": name, "name": name, "kind": "agent", "role": "planner",
    "module": "core"} for name in names]


def journal_files(places):
    """The paths of the journal's files, in order."""
    return [f"{places.journal}/{first}.jsonl" for first in sorted(int(n[:-6]) for n in os.listdir(places.journal) if n[-6:] == ".jsonl")]


def journal_events(places):
    """The events in the journal's files, by hand: what is durable."""
    found = []
    for path in journal_files(places):
        with open(path, "rb") as file:
            found += [json.loads(line) for line in file.read().split(b"\n")[1:-1] if line]      # empty: removed on purpose
    return found


def branch_ids(places):
    return {event["event_id"] for event in thrum.read_log(places.sync)}


def shared_ids(places):
    return {event["event_id"] for event in journal_events(places) if event["type"] not in LOCAL}


def same_after(places, ledger, events, damage=lambda: None, orderly=False):
    """`ledger` stops, something happens, and another start answers as before; gives the new ledger."""
    before = answers(ledger.store, events)
    ledger.close() if orderly else crash(ledger)
    damage()
    again = start(places)
    found = difference(before, answers(again.store, events))
    assert not found, f"before the stop against after it {found}"
    return again


def live(places, seed, batches=40, local=True):
    """A ledger that took over what other machines had written and then worked on, with requests that fail among them.

    Without `local`, all that happens is on the branch too.
    """
    rng = random.Random(seed)
    foreign = [event for event in history(seed, 30) if event["type"] not in LOCAL]
    own = [event for event in history(seed + 10_000, 80, rough=False) if known(event) and (local or event["type"] not in LOCAL)]
    with open(places.sync + "/events.jsonl", "ab") as file:
        file.write(b"".join(thrum.canonical(event) + b"\n" for event in foreign))
    ledger, made = start(places, START + rng.randrange(-3600, 36_000) * thrum.NS), []
    assert {event["event_id"] for event in foreign} <= {event["event_id"] for event in journal_events(places)}
    for _ in range(batches):
        if not own:
            break
        ledger.world.at += rng.randrange(600) * thrum.NS
        requests, fails = [], []
        for event in own[:rng.randrange(1, 5)]:
            fail = rng.random() < 0.2
            requests.append(_failing(event, rng.choice(foreign)) if fail else request(event))
            fails.append(fail)
        outcomes, events = ledger.commit(requests)
        assert [isinstance(outcome, Oops) for outcome in outcomes] == fails, f"seed {seed}: {outcomes}"
        made += [event for _, event in events]
        own = own[len(requests):]
    return ledger, foreign + made


class Oops(thrum.ThrumError):
    pass


def _failing(event, other):
    """A request that raises after it has made two events, or none."""
    def decide(context):
        if event["type"] != "message.create":
            request(event)(context)
            request(other if known(other) else event)(context)
        raise Oops("on purpose")
    return decide


# ---- commit

def test_a_batch_is_one_sync_and_each_request_sees_those_before(tmp_path, monkeypatch):
    ledger, syncs, seen = start(places_in(tmp_path)), [], []
    real = thrum.durable_sync
    monkeypatch.setattr(thrum, "durable_sync", lambda descriptor: (syncs.append(1), real(descriptor)))

    def look(context):
        seen.append(context.store.page(receiver="bob")["total"])
    do_all = [*map(request, agents("ada", "bob")), look, request(message(1)), look, request(message(2)), look]
    before = ledger.journal.last
    outcomes, events = ledger.commit(do_all)
    assert seen == [0, 1, 2]
    assert len(syncs) == 1
    assert [sequence for sequence, _ in events] == [event["sequence"] for _, event in events] == list(range(before + 1, before + 5))
    assert [outcome and outcome["type"] for outcome in outcomes] == \
        ["agent.register", "agent.register", None, "message.create", None, "message.create", None]
    assert journal_events(ledger.places)[before:] == [event for _, event in events]


def test_what_a_request_appends_has_every_common_field(tmp_path):
    ledger = start(places_in(tmp_path))
    (event,) = do(ledger, message(1, session_id="", scopes=[], thread_id=None, send_key=""))
    assert event == {"type": "message.create", "message_id": "msg_0001", "agent_id": "ada", "body": {"format": "plain", "content": "m1"},
                     "recipients": ["bob"], "refs": [{"type": "mention", "value": "bob"}], "v": 1, "origin_daemon": ledger.daemon_id,
                     "event_id": event["event_id"], "timestamp": event["timestamp"], "sequence": ledger.journal.last}
    assert thrum.canonical(event) == list(ledger.journal.read(ledger.journal.last - 1))[0][1]
    late = ledger.commit([lambda context: context.append("message.delete", after=START + 10**18, message_id="msg_0001")])[0][0]
    assert thrum.ns_of(late["timestamp"]) > START + 10**18


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_request_that_raises_leaves_nothing(tmp_path, failing):
    """Not in the log, the database or the branch, and nobody else in the batch is harmed."""
    places = places_in(tmp_path)
    ledger = start(places)
    do(ledger, *agents("ada", "bob"))
    requests = [request(message(n)) for n in range(4)]
    requests[failing] = _failing(agents("eve")[0], message(9))
    outcomes, events = ledger.commit(requests)
    assert [isinstance(outcome, Oops) for outcome in outcomes] == [n == failing for n in range(4)]
    expected = [f"msg_{n:04}" for n in range(4) if n != failing]
    assert [event["message_id"] for _, event in events] == expected
    assert [event["message_id"] for event in journal_events(places)[-3:]] == expected
    assert [event["sequence"] for event in journal_events(places)] == list(range(1, ledger.journal.last + 1))
    assert ledger.store.agent("eve") is None
    assert sorted(m["message_id"] for m in ledger.store.page(receiver="bob")["messages"]) == expected
    ledger = same_after(places, ledger, journal_events(places), lambda: os.unlink(places.database))
    assert branch_ids(places) == shared_ids(places)


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError, thrum.InvalidParams, AssertionError])
def test_any_error_in_a_request_is_its_own(tmp_path, error):
    ledger = start(places_in(tmp_path))

    def decide(context):
        request(message(1))(context)
        raise error("oops")
    (first, outcome, last), events = ledger.commit([request(message(0)), decide, request(message(2))])
    assert type(outcome) is error
    assert [event["message_id"] for _, event in events] == ["msg_0000", "msg_0002"]
    assert ledger.store.message("msg_0001") is None


def test_a_line_that_is_too_long_is_refused_to_the_byte(tmp_path):
    places = places_in(tmp_path)
    ledger = start(places)
    (event,) = do(ledger, message(0))
    room = thrum.LINE_MAX - len(thrum.canonical(event)) + len("m0")
    for content, fits in (("x" * room, True), ("x" * (room + 1), False), ("<" * (room // 6 + 1), False), ("é" * (room // 2 + 1), False)):
        before = journal_events(places)
        (outcome,), events = ledger.commit([request(message(1, body={"format": "plain", "content": content}))])
        if fits:
            assert len(thrum.canonical(outcome)) == thrum.LINE_MAX
        else:
            assert isinstance(outcome, thrum.ThrumError) and "65,535" in str(outcome)
            assert journal_events(places) == before and not events


def test_text_that_is_no_unicode_is_refused(tmp_path):
    ledger = start(places_in(tmp_path))
    (outcome, fine), events = ledger.commit([request(message(1, body={"format": "plain", "content": "\ud800"})), request(message(2))])
    assert isinstance(outcome, thrum.InvalidParams)
    assert [event["message_id"] for _, event in events] == ["msg_0002"]


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


FAULTS = {
    "sync": lambda patch, ledger: patch.setattr(thrum, "durable_sync", no_space),
    "write": lambda patch, ledger: patch.setattr(thrum, "write_all", no_space),
    "half a write": lambda patch, ledger: patch.setattr(thrum, "write_all", lambda fd, data: (os.write(fd, data[:-9]), no_space())),
    "commit": lambda patch, ledger: patch.setattr(ledger.store, "commit", lambda: (_ for _ in ()).throw(
        thrum.sqlite3.OperationalError("database or disk is full"))),
    "begin": lambda patch, ledger: patch.setattr(ledger.store, "begin", lambda: (_ for _ in ()).throw(
        thrum.sqlite3.OperationalError("database is locked"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_batch_is_no_batch(tmp_path, monkeypatch, fault):
    """Nothing stored, everybody told, and afterwards store and journal agree and go on."""
    places = places_in(tmp_path)
    ledger, events = live(places, 7)
    before = answers(ledger.store, events)
    lines, last, eve = journal_events(places), ledger.journal.last, agents("eve")[0]
    with monkeypatch.context() as patch:
        FAULTS[fault](patch, ledger)
        outcomes, made = ledger.commit([request(eve), request(message(1, to=("agent0",))), _failing(eve, message(3)), request(message(2))])
    assert all(isinstance(outcome, thrum.ThrumError) for outcome in outcomes) and len(outcomes) == 4
    assert "nothing was stored" in str(outcomes[0])
    assert not made and ledger.journal.last == last
    assert journal_events(places) == lines
    assert not difference(before, answers(ledger.store, events))
    do(ledger, message(5, to=("agent0",)))
    assert journal_events(places)[len(lines):][0]["sequence"] == last + 1
    again = same_after(places, ledger, journal_events(places))
    assert again.rebuilt == 0, "nothing to be mended"
    again = same_after(places, again, journal_events(places), lambda: os.unlink(places.database))
    assert branch_ids(places) == shared_ids(places)


# ---- live and rebuilt

@pytest.mark.parametrize("first", range(0, 24, 6))
def test_a_rebuild_answers_as_the_live_store(tmp_path, first):
    """Own and foreign events, clocks that differ, requests that fail: after a rebuild the same answers and sequences."""
    for seed in range(first, first + 6):
        places = places_in(tmp_path / str(seed))
        ledger, events = live(places, seed)
        before = answers(ledger.store, events)
        numbers = ledger.store.rows("select message_id, seq from messages order by seq")
        crash(ledger)
        os.unlink(places.database)
        again = start(places)
        found = difference(before, answers(again.store, events))
        assert not found, f"seed {seed}: live against rebuilt {found}"
        assert again.store.rows("select message_id, seq from messages order by seq") == numbers, f"seed {seed}"
        assert again.rebuilt == again.journal.last
        again.close()


def test_a_change_between_messages_survives_a_request_that_fails(tmp_path):
    """A registration before messages that other clocks stamped later gets these, also if a later request of the batch is undone."""
    places = places_in(tmp_path)
    future = {**message(1, author="far", to=()), "timestamp": thrum.stamp_of(START + 10**15 + 1), "event_id": "evt_f", "v": 1,
              "origin_daemon": "d_far"}
    del future["recipients"], future["refs"]
    with open(places.sync + "/events.jsonl", "wb") as file:
        file.write(thrum.canonical(future) + b"\n")
    ledger = start(places)
    outcomes, _ = ledger.commit([request(agents("bob")[0]), _failing(agents("eve")[0], agents("max")[0]), request(agents("ada")[0])])
    assert isinstance(outcomes[1], Oops)
    for agent, expected in (("bob", ["msg_0001"]), ("ada", ["msg_0001"]), ("eve", [])):
        got = [m["message_id"] for m in ledger.store.page(receiver=agent)["messages"]]
        assert got == (expected or ["msg_0001"]), agent     # somebody unknown sees what is for everybody
        assert bool(ledger.store.agent(agent)) is bool(expected)
    same_after(places, ledger, journal_events(places), lambda: os.unlink(places.database))


def test_a_clean_stop_costs_the_next_start_nothing(tmp_path):
    places = places_in(tmp_path)
    ledger, events = live(places, 1)
    again = same_after(places, ledger, events, orderly=True)
    assert again.rebuilt == 0
    assert branch_ids(places) == shared_ids(places)
    assert os.stat(places.database).st_mode & 0o777 == 0o600


def test_stamps_and_ids_go_on_rising_after_a_start(tmp_path):
    """Also when the clock was set back meanwhile."""
    places = places_in(tmp_path)
    ledger = start(places, START + 10**15)
    (one,) = do(ledger, message(1))
    crash(ledger)
    ledger = start(places, START)
    (two,) = do(ledger, message(2))
    assert two["timestamp"] > one["timestamp"]
    assert two["origin_daemon"] == one["origin_daemon"]


# ---- damage

def overwrite(path, data):
    with open(path, "wb") as file:
        file.write(data)


def rewrite(path, change):
    with open(path, "rb") as file:
        data = file.read()
    overwrite(path, change(data))


def last_file(places):
    return journal_files(places)[-1]


def old_database(places):
    db = thrum.sqlite3.connect(places.database)
    db.execute("update schema_version set version = 0")
    db.commit()
    db.close()


def other_epoch(places):
    db = thrum.sqlite3.connect(places.database)
    db.execute("update meta set value = 'other' where key = 'epoch'")
    db.commit()
    db.close()


def ahead(places):
    """The database has events that the journal lacks: a line that was never acknowledged, or a journal put back."""
    rewrite(last_file(places), lambda data: data[:data[:-1].rfind(b"\n") + 1])


DATABASE = {
    "deleted": lambda p: os.unlink(p.database),
    "deleted with its companions": lambda p: [os.unlink(p.database + s) for s in ("", "-wal", "-shm") if os.path.exists(p.database + s)],
    "empty": lambda p: overwrite(p.database, b""),
    "truncated": lambda p: os.truncate(p.database, os.path.getsize(p.database) // 2),
    "truncated to a page": lambda p: os.truncate(p.database, 4096),
    "truncated in a page": lambda p: os.truncate(p.database, 5000),
    "garbage": lambda p: overwrite(p.database, os.urandom(50_000)),
    "garbage in the middle": lambda p: rewrite(p.database, lambda d: d[:8192] + b"\xff" * (len(d) - 8192)),
    "another program's": lambda p: (os.unlink(p.database),
    thrum.sqlite3.connect(p.database).execute("create table x(y)").connection.close()),
    "write-ahead log deleted": lambda p: [os.unlink(p.database + s) for s in ("-wal", "-shm") if os.path.exists(p.database + s)],
    "garbage in the write-ahead log": lambda p: overwrite(p.database + "-wal", os.urandom(50_000)),
    "of an old version": old_database,
    "of another journal": other_epoch,
    "ahead of the journal": ahead,
}


@pytest.mark.parametrize("orderly", [False, True], ids=["after a crash", "after a clean stop"])
@pytest.mark.parametrize("what", DATABASE)
def test_the_database_is_disposable(tmp_path, what, orderly):
    """Whatever happened to it, the next start answers as before, with the same sequences, and goes on."""
    places = places_in(tmp_path)
    ledger, events = live(places, 2, 15, local=False)
    ledger.flush(sync=True)
    ledger = same_after(places, ledger, events, lambda: DATABASE[what](places), orderly)
    if what.startswith(("of a", "empty", "garbage in the middle", "ahead")):
        assert ledger.rebuilt >= len(journal_events(places)) - 1, "made anew, not trusted"
    do(ledger, message(1, to=("agent0",)))
    assert [event["sequence"] for event in journal_events(places) if event["origin_daemon"] == ledger.daemon_id]
    same_after(places, ledger, journal_events(places))


def no_var(places):
    shutil.rmtree(places.var)


def journal_header(places):
    rewrite(places.journal + "/1.jsonl", lambda data: b"garbage\n" + data.partition(b"\n")[2])


JOURNAL = {
    "all of var deleted": no_var,
    "journal deleted": lambda p: shutil.rmtree(p.journal),
    "journal and database deleted": lambda p: (shutil.rmtree(p.journal), os.unlink(p.database)),
    "journal's files deleted": lambda p: [os.unlink(f"{p.journal}/{name}") for name in os.listdir(p.journal)],
    "first line damaged": journal_header,
    "emptied": lambda p: overwrite(last_file(p), b""),
    "first file and database deleted": lambda p: (os.unlink(p.journal + "/1.jsonl"), os.unlink(p.database)),
    "a file between and database deleted": lambda p: (
        os.unlink(journal_files(p)[1]), os.unlink(p.database)),
    "last file and database deleted": lambda p: (os.unlink(last_file(p)), os.unlink(p.database)),
    "last line cut": lambda p: rewrite(last_file(p), lambda data: data[:-9]),
    "last line cut, database deleted": lambda p: (rewrite(last_file(p), lambda data: data[:-9]), os.unlink(p.database)),
    "last newline cut": lambda p: rewrite(last_file(p), lambda data: data[:-1]),
    "half of the last file cut": lambda p: rewrite(last_file(p), lambda data: data[:len(data) // 2]),
    "a branch file's last line cut": lambda p: rewrite(p.sync + "/events.jsonl", lambda data: data[:-9]),
    "branch files deleted": lambda p: [os.unlink(path) for path in thrum.log_files(p.sync)],
    "a line of garbage in a branch file": lambda p: rewrite(p.sync + "/events.jsonl", lambda data: data + b"garbage\n"),
    "a directory in the journal": lambda p: os.mkdir(p.journal + "/aside"),
    "the mark of a clean stop damaged": lambda p: overwrite(p.var + "/clean.json", b"{"),
    "the daemon's id damaged": lambda p: overwrite(p.var + "/daemon.json", b"garbage"),
}


@pytest.mark.parametrize("orderly", [False, True], ids=["after a crash", "after a clean stop"])
@pytest.mark.parametrize("what", JOURNAL)
def test_nothing_is_lost(tmp_path, monkeypatch, what, orderly):
    """Journal or branch files are damaged or gone: the other has the events, and both are whole after the next start."""
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 4_000)
    monkeypatch.setattr(thrum, "BRANCH_FILE_MAX", 3_000)
    places = places_in(tmp_path)
    ledger, _ = live(places, 3, local=False)
    ledger.flush()
    assert len(os.listdir(places.journal)) > 3 and len(ledger.branch.files("events")) > 1
    ids = shared_ids(places)
    again = same_after(places, ledger, journal_events(places), lambda: JOURNAL[what](places), orderly)
    (new,) = do(again, message(9999, to=("agent0",)))
    again.close()
    assert ids | {new["event_id"]} <= shared_ids(places) == branch_ids(places)
    final = start(places)
    assert final.rebuilt == 0
    assert final.journal.mended is False
    final.close()


def test_a_new_journal_has_a_new_epoch(tmp_path):
    places = places_in(tmp_path)
    ledger, events = live(places, 4, 10)
    epoch = ledger.journal.epoch
    ledger.close()
    shutil.rmtree(places.journal)
    again = start(places)
    assert again.journal.epoch != epoch
    assert again.store.meta("epoch") == again.journal.epoch, "a database of the old one has other sequences"
    made = [(thrum.ns_of(event["timestamp"]), event["event_id"]) for event in journal_events(places)]
    assert made == sorted(made), "made anew, it is in the order of time"


def test_every_crash_between_sync_and_commit_is_made_up_for(tmp_path):
    """Lines that are in the journal and nowhere else: the next start projects and exports them."""
    places = places_in(tmp_path)
    ledger, events = live(places, 5, 10)
    (first,) = do(ledger, *agents("zoe"))
    last = ledger.journal.last
    lines = []
    for number in range(5):
        event = {**message(number, author="zoe", to=("agent0",)), "type": "message.create", "event_id": f"evt_x{number}", "v": 1,
                 "timestamp": thrum.stamp_of(thrum.ns_of(first["timestamp"]) + 11 + number * 2), "origin_daemon": ledger.daemon_id,
                 "sequence": last + number + 1}
        lines.append(thrum.canonical(event))
    ledger.journal.append(lines)
    crash(ledger)
    again = start(places)
    assert again.rebuilt == 5
    assert again.store.outbox("zoe")["total"] == 5
    again.close()
    assert {f"evt_x{number}" for number in range(5)} <= branch_ids(places)


def test_a_journal_cut_at_any_byte_of_its_last_batch(tmp_path):
    """What the branch files have comes back; what they lack was not acknowledged; no cut stops the next start."""
    places = places_in(tmp_path / "base")
    ledger = start(places)
    do(ledger, *agents("ada", "bob"))
    do(ledger, message(1))
    ledger.flush(sync=True)
    size = ledger.journal.size
    do(ledger, message(2))
    crash(ledger)
    full = os.path.getsize(last_file(places))
    for cut in [*range(size - 40, full, 23), full - 1, full]:
        other = places_in(tmp_path / f"cut{cut}")
        shutil.copytree(tmp_path / "base", tmp_path / f"cut{cut}", dirs_exist_ok=True)
        os.truncate(last_file(other), cut)
        again = start(other)
        got = sorted(m["message_id"] for m in again.store.page(receiver="bob")["messages"])
        assert got == (["msg_0001", "msg_0002"] if cut == full else ["msg_0001"]), f"cut at {cut} of {full}"
        do(again, message(3))
        again.close()
        assert branch_ids(other) == shared_ids(other), f"cut at {cut}"
        shutil.rmtree(tmp_path / f"cut{cut}")


ODD_LINES = [
    b"", b"garbage", b"\xff\xfe", b"[]", b"{}", b"5", b"[" * 100_000, b'{"type":"message.create"}', b"null", b"\0" * 100,
    b'{"body":5,"event_id":"e1","message_id":"m","timestamp":"2026-03-10T09:00:00Z","type":"message.delete"}',
    b'{"event_id":"e2","scopes":5,"timestamp":"2026-03-10T09:00:00Z","type":"x"}',
    b'{"event_id":"e3","recipients":5,"timestamp":"2026-03-10T09:00:00Z","type":"x"}',
    b'{"body":{"content":"x","structured":{"a":1}},"event_id":"e4","message_id":"msg_0001","timestamp":"2026-03-10T09:00:00Z",'
    b'"type":"message.edit"}',
    b'{"agent_id":"ada","body":{"content":"\\ud800"},"event_id":"e5","message_id":"m5","timestamp":"2026-03-10T09:00:00Z","type":"message.create"}',
    b'{"agent_id":"\\ud800","event_id":"e6","kind":"agent","module":"m","role":"r","timestamp":"2026-03-10T09:00:00Z","type":"agent.register"}',
    b'{"event_id":"e7","message_id":"unknown","body":{"x":' + b"[" * 983 + b"]" * 983
    + b'},"timestamp":"2026-03-10T09:00:00Z","type":"message.edit"}',
    b'{"cutoff":"yesterday","event_id":"e8","timestamp":"2026-03-10T09:00:00Z","type":"purge.executed"}',
    b'{"cutoff":"9999-01-01T00:00:00Z","event_id":"e9","timestamp":"2026-02-01T09:00:00Z","type":"purge.executed"}',
    b'{"event_id":"e10","timestamp":"9999-03-10T09:00:00Z","type":"purge.executed","cutoff":"9999-01-01T00:00:00Z"}',
    b'{"agent_id":"ada","event_id":"e11","timestamp":"2026-03-10T09:00:00Z","type":"agent.update","work_contexts":[5,null,{"session_id":5},'
    b'{"session_id":"s","git_updated_at":"x","branch":{"a":[1]},"intent_updated_at":5}]}',
    b'{"event_id":"e12","fields":{"name":5,"description":["x"]},"group_id":"grp_everyone",'
    b'"timestamp":"2026-03-10T09:00:00Z","type":"group.update"}',
    b'{"agent_id":"../../../etc/x","body":{"content":"out"},"event_id":"e13","message_id":"m13","timestamp":"2026-03-10T09:00:00Z",'
    b'"type":"message.create"}',
    b'{"event_id":"e14","sequence":' + b"9" * 4000 + b',"timestamp":"2026-03-10T09:00:00Z","type":"x"}',
    b'{"event_id":"e15","group_id":"g","member_type":"group","member_value":"everyone",'
    b'"timestamp":"2026-03-10T09:00:00Z","type":"group.member.add"}',
    b'{"agent_id":"ada","body":{"content":"' + b"x" * 2_000_000 + b'"},"event_id":"e16","message_id":"m16",'
    b'"timestamp":"2026-03-10T09:00:00Z","type":"message.create"}',
]


@pytest.mark.parametrize("line", ODD_LINES, ids=[repr(line[:60]) for line in ODD_LINES])
@pytest.mark.parametrize("where", ["branch", "journal"])
def test_an_odd_line_costs_at_most_itself(tmp_path, line, where):
    """What others pushed, or a disk made of it, never keeps the daemon from starting or the next events from being seen."""
    places = places_in(tmp_path)
    ledger = start(places)
    do(ledger, *agents("ada", "bob"))
    do(ledger, message(1))
    ledger.close()
    if where == "branch":
        rewrite(places.sync + "/events.jsonl", lambda data: line + b"\n" + data + line + b"\n")
        shutil.rmtree(places.var)
    else:
        rewrite(last_file(places), lambda data: data + line + b"\n")
        os.unlink(places.database)
    ledger = start(places)
    assert [m["message_id"] for m in ledger.store.page(receiver="bob", mention="bob")["messages"]] == ["msg_0001"]
    do(ledger, message(2))
    before = sorted(m["message_id"] for m in ledger.store.page(receiver="bob", mention="bob")["messages"])
    assert before == ["msg_0001", "msg_0002"]
    outside = set(os.listdir(tmp_path))
    ledger.close()
    assert set(os.listdir(tmp_path)) == outside
    again = start(places)
    assert sorted(m["message_id"] for m in again.store.page(receiver="bob", mention="bob")["messages"]) == before
    again.close()


# ---- branch files

def test_events_go_to_their_branch_files(tmp_path):
    """Messages and what concerns them to their author's file, everything else to one, what is local to none."""
    places = places_in(tmp_path)
    ledger = start(places)
    do(ledger, *agents("ada", "bob"), {"type": "agent.session.start", "session_id": "ses_1", "agent_id": "ada"},
       {"type": "session.update", "session_id": "ses_1", "agent_id": "ada", "intent": "local"}, message(1), message(2, author="bob",
       to=("ada",)),
       message(3, author="user:dana"))
    do(ledger, {"type": "message.receipt", "message_id": "msg_0001", "agent_id": "bob", "receipt_type": "read"},
       {"type": "message.edit", "message_id": "msg_0002", "body": {"format": "plain", "content": "x"}, "agent_id": "bob"},
       {"type": "message.delete", "message_id": "msg_0003"})
    ledger.flush(sync=True)
    found = {os.path.relpath(path, places.sync): [e["type"] for e in thrum.read_log(path)] for path in thrum.log_files(places.sync)}
    assert found == {
        "events.jsonl": ["group.create", "group.member.add", "agent.register", "agent.register", "agent.session.start"],
        "messages/ada.jsonl": ["message.create", "message.receipt"], "messages/bob.jsonl": ["message.create", "message.edit"],
        "messages/user_dana.jsonl": ["message.create", "message.delete"]}
    assert not ledger.unsynced()
    for path in thrum.log_files(places.sync):
        for line in thrum.read_lines(path):
            assert thrum.canonical(json.loads(line)) == line


def test_a_crash_before_the_branch_files_were_written_is_made_up_for(tmp_path):
    places = places_in(tmp_path)
    ledger, _ = live(places, 6)
    do(ledger, message(9999, to=("agent0",)))
    assert not shared_ids(places) <= branch_ids(places), "else this test shows nothing"
    crash(ledger)
    again = start(places)
    assert branch_ids(places) == shared_ids(places)
    before = {path: os.path.getsize(path) for path in thrum.log_files(places.sync)}
    crash(again)
    crash(start(places))
    assert {path: os.path.getsize(path) for path in thrum.log_files(places.sync)} == before, "nothing is written twice"


@pytest.mark.parametrize("commits", [10, 700])
def test_branch_files_that_cannot_be_written_are_completed_later(tmp_path, monkeypatch, commits):
    """Sends go on while the branch cannot be written, and nothing is missing from it afterwards."""
    places = places_in(tmp_path)
    ledger = start(places)
    do(ledger, *agents("ada", "bob"))
    ledger.flush(sync=True)
    with monkeypatch.context() as patch:
        patch.setattr(thrum.Branch, "append", no_space)
        patch.setattr(thrum, "durable_sync", lambda descriptor: None)       # a thousand syncs take their time
        for number in range(commits):
            do(ledger, message(number))
        ledger.flush(sync=True)
        assert ledger.export_problem
    ledger.flush(sync=True)
    assert not ledger.export_problem
    ledger.close()
    start(places).close()
    assert branch_ids(places) == shared_ids(places)


# ---- large

def expected_of(lines):
    """Inbox, unread, sent and threads of everybody, from the lines alone; all recipients are listed in them."""
    found, threads, messages = {}, {}, {}
    for line in lines:
        event = json.loads(line)
        if event["type"] == "message.create":
            message_id = event["message_id"]
            messages[message_id] = event
            found.setdefault(event["agent_id"], ([], set(), []))[2].append(message_id)
            for agent in set(event["recipients"]) - {event["agent_id"]}:
                found.setdefault(agent, ([], set(), []))[0].append(message_id)
                found[agent][1].add(message_id)
            if "thread_id" in event:
                members = threads.setdefault(event["thread_id"], set())
                members |= {message_id} | {pair["value"] for pair in event["refs"] if pair["type"] == "reply_to"}
        elif event["type"] == "message.receipt":
            found[event["agent_id"]][1].discard(event["message_id"])
    return found, threads


def everything(store, names):
    """Inbox, unread, sent and threads of everybody, as a store says it."""
    found, threads = {}, {}
    for name in names:
        inbox, sent = store.page(receiver=name, limit=100_000, ascending=True), store.outbox(name, limit=100_000)
        unread = [m["message_id"] for m in inbox["messages"] if not m["is_read"]]
        page = store.page(receiver=name, unread=True, limit=20)
        assert [m["message_id"] for m in page["messages"]] == unread[:-21:-1]
        assert (inbox["total"], inbox["unread"], page["total"]) == (len(inbox["messages"]), len(unread), len(unread))
        assert sent["total"] == len(sent["messages"])
        found[name] = ([m["message_id"] for m in inbox["messages"]], set(unread), [m["message_id"] for m in reversed(sent["messages"])])
        for m in inbox["messages"] + sent["messages"]:
            if m["thread_id"]:
                threads.setdefault(m["thread_id"], set()).add(m["message_id"])
    return found, threads


@pytest.mark.slow
def test_ten_thousand_messages_of_fifty_agents(tmp_path):
    """Inbox, unread, sent and threads of everybody are what stands in the log, live and after a rebuild."""
    places = places_in(tmp_path)
    count = fill(places, 10_000, agents=50, seed=1, unread=0.8)
    names, rng = [f"agent{n:03}" for n in range(50)], random.Random(1)
    ledger = start(places, START)
    assert ledger.rebuilt == count and ledger.daemon_id == "d_generated000"
    for batch in range(10):
        do(ledger, *[message(100 * batch + n, rng.choice(names), sorted(rng.sample(names, 2))) for n in range(20)])
    old = ledger.store.page(receiver="agent000", unread=True, limit=100, ascending=True)["messages"]
    do(ledger, *[{"type": "message.receipt", "message_id": m["message_id"], "agent_id": "agent000", "receipt_type": "read"} for m in old])
    expected, threads = expected_of(line for _, line in ledger.journal.read())
    live_answers = everything(ledger.store, names)
    assert live_answers[1] == threads
    for name in names:
        assert live_answers[0][name] == expected[name], name
    crash(ledger)
    os.unlink(places.database)
    again = start(places, START)
    assert everything(again.store, names) == live_answers
    crash(again)
