"""Thread streams (section 12) without a socket, and what is reported of tasks and processes.

A `Hall` is a ledger with the streams of its connections, as the daemon has them; a `Client` is one connection: what it
has `got` are the events that reached it, and while it is `stopped` they wait in its queue.  Time moves when a test moves it.
"""

import asyncio
import bisect
import json
import random

import pytest

import thrum
from conftest import FakeWorld

SECOND = thrum.NS
PLACES = 256        # of the queue to a client


class Hall:
    def __init__(self, top):
        (top / ".thrum" / "identities").mkdir(parents=True)
        (top / ".git" / "thrum-sync" / "a-sync" / "messages").mkdir(parents=True)
        self.world, self.kept, self.asked = FakeWorld(), 0, 0
        self.places = thrum.Places(str(top), str(top / ".thrum"), str(top / ".git"))
        self.ledger = thrum.Ledger(self.places, self.world)
        self.ledger.facts.update(started=0, stop=lambda: None, live=lambda kind, data: self.streams.tell(kind, data, self.world.at))
        self.ledger.open("r_0123456789AB")
        self.reading = thrum.Store(self.places.database, self.world)
        self.streams = thrum.Streams(self.keep)
        self.count, self.held, self.holds = 0, [], False
        self.agent("ada", "bob", "cyd")

    def keep(self):
        self.kept += 1

    def close(self):
        self.reading.close()
        self.ledger.close()

    # ---- as the daemon does it

    def change(self, handler, params):
        (outcome,) = self.commit(lambda context: handler(context, params))
        self.tell()             # what was written before is told before
        return outcome

    def commit(self, *requests):
        """One batch; gives the outcomes, exceptions among them.  With `holds` it is told later, as by a busy loop."""
        outcomes, events = self.ledger.commit(list(requests))
        if events and self.streams:
            self.held.append(thrum.stream_news(self.ledger.store, events))
        if not self.holds:
            self.tell()
        return outcomes

    def tell(self):
        """Tell what was held back."""
        while self.held:
            self.streams.publish(self.held.pop(0), self.world.at)

    def ask(self, handler, params):
        self.asked += 1
        context = thrum.Context(self.world, self.reading, self.ledger)
        try:
            return json.loads(json.dumps(self.reading.within(10, lambda: handler(context, params))))
        except thrum.ThrumError as error:
            return error

    def keep_acks(self):
        acks = self.streams.take_acks()
        self.commit(lambda context: thrum.note_stream_acks(context, acks))

    def call(self, method, **params):
        row = thrum.METHODS[method]
        checked = thrum.check_params(row, params)
        outcome = self.change(row.handler, checked) if row.writes else self.ask(row.handler, checked)
        if isinstance(outcome, Exception):
            raise outcome
        return json.loads(json.dumps(outcome))

    def emit(self, *events):
        """Events of (type, fields) in one batch; gives them as they were made."""
        def request(kind, fields):
            return lambda context: context.append(kind, **fields)
        self.world.at += 1_000_000
        outcomes = self.commit(*(request(kind, fields) for kind, fields in events))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    # ---- what there is to tell of

    def agent(self, *names):
        self.emit(*(("agent.register", {"agent_id": name, "kind": "agent", "role": "x", "module": "m", "name": name}) for name in names))

    def message(self, thread="", content="", author="ada", to=("bob",), refs=(), reply_to="", **more):
        """The event of a message, as a pair for `emit`."""
        self.count += 1
        refs = [{"type": "mention", "value": one} for one in to] + list(refs) + (
            [{"type": "reply_to", "value": reply_to}] if reply_to else [])
        return "message.create", {"message_id": f"msg_{self.count:05}", "agent_id": author, "thread_id": thread, "recipients": list(to),
                                  "refs": refs, "body": {"format": "plain", "content": content or f"m{self.count}"}, **more}

    def send(self, thread="", **more):
        """Write one message; gives its id."""
        return self.emit(self.message(thread, **more))[0]["message_id"]

    def fill(self, thread, count, batch=100, **more):
        """Write so many messages to a thread; gives their ids."""
        ids = []
        for start in range(0, count, batch):
            ids += [event["message_id"] for event in self.emit(*(self.message(thread, **more) for _ in range(min(batch, count - start))))]
        return ids


class Client:
    def __init__(self, hall, instance_id="tab", places=PLACES):
        self.hall, self.got, self.queue, self.stopped, self.places = hall, [], [], False, places
        self.closed, self.woken, self.sent = 0, False, []
        self.stream = hall.streams.open(instance_id, hall.world.at, self.send, self.close, self.wake)

    def send(self, payload, spare):
        if self.places - len(self.queue) <= spare:
            return False
        self.queue.append(payload)
        data = json.loads(payload).get("data", {})
        self.sent += [self.hall.world.at] * (len(data["messages"]) if "messages" in data else int("message_seq" in data))
        if not self.stopped:
            self.read()
        return True

    def read(self):
        """Take what waits, as a client that reads again."""
        self.got += map(json.loads, self.queue)
        self.queue.clear()

    def close(self, code):
        self.closed = code

    def wake(self):
        self.woken = True

    def leave(self):
        self.hall.streams.close(self.stream)

    def say(self, event):
        """Send an event, a dict, or bytes as they are; gives what comes in answer at once."""
        before = len(self.got)
        now = self.hall.world.at
        ask = self.stream.take(event if isinstance(event, bytes) else json.dumps(event).encode(), now)
        if ask:
            self.stream.answered(ask, self.hall.change(ask.handler, ask.params), now)
        return self.got[before:]

    def subscribe(self, thread, from_seq=0):
        """Subscribe and let it be answered; gives what came."""
        before = len(self.got)
        self.say({"type": "subscribe", "data": {"thread_id": thread, "from_seq": from_seq}})
        self.pump()
        return self.got[before:]

    def ack(self, thread, seq):
        return self.say({"type": "ack", "data": {"thread_id": thread, "ack_seq": seq}})

    def step(self):
        """Do the next thing that is due; True, or what `due` says when it is nothing."""
        if self.queue:
            return None         # it has to read first
        due = self.stream.due(self.hall.world.at)
        if not isinstance(due, thrum.Ask):
            return due
        self.stream.answered(due, self.hall.ask(due.handler, due.params), self.hall.world.at)
        return True

    def pump(self):
        """Do all that is due now; gives the seconds to what is due later, None for nothing."""
        due = True
        while due is True:
            due = self.step()
        return due

    def settle(self, seconds=1000):
        """Let time pass until there is nothing more to send."""
        until = self.hall.world.at + int(seconds * SECOND)
        while (due := self.pump()) is not None and self.hall.world.at < until:
            self.hall.world.at += int(due * SECOND) + 1
        return self

    # ---- what it has got

    def of(self, *kinds):
        return [event["data"] for event in self.got if event["type"] in kinds]

    def rows(self, thread):
        """The messages of a thread, from events of either kind, in the order in which they came."""
        found = []
        for event in self.got:
            if event["type"] == "message":
                found.append(event["data"])
            elif event["type"] == "batch":
                found += event["data"]["messages"]
        return [row for row in found if row["thread_id"] == thread]

    def numbers(self, thread):
        return [row["message_seq"] for row in self.rows(thread)]

    def ids(self, thread):
        return [row["id"] for row in self.rows(thread)]

    def codes(self):
        return [error["code"] for error in self.of("error")]


@pytest.fixture
def hall(tmp_path, monkeypatch):
    monkeypatch.setattr(thrum, "durable_sync", lambda descriptor: None)         # it is not about power cuts
    made = Hall(tmp_path)
    yield made
    made.close()


@pytest.fixture
def client(hall):
    return Client(hall)


def to(first, last):
    return list(range(first, last + 1))


def since(client, place):
    """What a client has got since a place in `got`, to be asked as it is."""
    part = Client.__new__(Client)
    part.got = client.got[place:]
    return part


# ---- events and their fields

def test_a_message_has_the_contracts_fields_in_their_order(hall, client):
    hall.emit(("thread.create", {"thread_id": "thr_t", "title": "Parser"}))
    sent = hall.send("thr_t", content="hello", scopes=[{"type": "module", "value": "core"}])
    batch = client.subscribe("thr_t")[0]
    assert list(batch) == ["type", "timestamp", "data"] and batch["timestamp"] == hall.world.at // 1_000_000
    assert list(batch["data"]) == ["thread_id", "messages", "has_more"]
    (row,) = batch["data"]["messages"]
    assert json.loads(row.pop("metadata_json")) == {
        "refs": [{"type": "mention", "value": "bob"}], "scopes": [{"type": "module", "value": "core"}]}
    assert row == {"id": sent, "thread_id": "thr_t", "message_seq": 1, "created_at": row["created_at"], "from_type": "agent",
                   "from_id": "ada", "to_type": "agent", "to_id": "bob", "kind": "status", "subject": "Parser", "content": "hello"}
    assert list(row) == ["id", "thread_id", "message_seq", "created_at", "from_type", "from_id", "to_type", "to_id", "kind", "subject",
                         "content"]
    hall.send("thr_t", content="again")
    assert list(client.of("message")[0]) == [*row, "metadata_json"]


@pytest.mark.parametrize("live", [False, True])
def test_who_speaks_to_whom_and_what_for(hall, client, live):
    """The same, read from the store and told live."""
    hall.emit(("thread.create", {"thread_id": "thr_t"}), *(("agent.register", {
        "agent_id": "user:leon", "kind": "user", "role": "leon", "module": "ui"}),))
    if live:
        client.subscribe("thr_t")
    ask = [{"type": "ask", "value": "yes|no"}]
    question = hall.send("thr_t", refs=ask)
    hall.emit(hall.message("thr_t", author="ada", to=("bob",), reply_to=question))                      # a word more, no answer
    hall.emit(hall.message("thr_t", author="bob", to=("ada",), reply_to=question))
    hall.emit(hall.message("thr_t", author="user:leon", to=("ada", "bob")), hall.message("thr_t", author="bob", to=("user:leon",)),
              hall.message("thr_t", author="user:leon", to=("ada",), reply_to=question), hall.message("thr_t", to=()))
    if not live:
        client.subscribe("thr_t")
    client.settle()
    assert [(row["from_type"], row["from_id"], row["to_type"], row["to_id"], row["kind"]) for row in client.rows("thr_t")] == [
        ("agent", "ada", "agent", "bob", "question"), ("agent", "ada", "agent", "bob", "status"),
        ("agent", "bob", "agent", "ada", "result"), ("human", "user:leon", "broadcast", "broadcast", "directive"),
        ("agent", "bob", "human", "user:leon", "status"), ("human", "user:leon", "agent", "ada", "result"),
        ("agent", "ada", "broadcast", "broadcast", "status")]


def test_structured_metadata_is_json_in_a_text(hall, client):
    for structured in ('{"k":[1,2]}', "{no json"):
        event = hall.message("thr_t", to=())
        event[1]["body"]["structured"] = structured
        hall.emit(event)
    client.subscribe("thr_t")
    assert [json.loads(row["metadata_json"]) for row in client.rows("thr_t")] == [{"structured": {"k": [1, 2]}}, {"structured": "{no json"}]
    hall.send("thr_t", to=())
    assert "metadata_json" not in client.of("message")[0]


@pytest.mark.parametrize(("said", "code"), [
    (b"not json", "PARSE_ERROR"), (b"[]", "PARSE_ERROR"), (b'"x"', "PARSE_ERROR"), (b"1", "PARSE_ERROR"), (b"\xff", "PARSE_ERROR"),
    (b"", "PARSE_ERROR"), (b'{"type":"ping"', "PARSE_ERROR"), (b'{"type":"ping","a":NaN}', "PARSE_ERROR"),
    (b"[" * 9000, "PARSE_ERROR"), (b"9" * 9000, "PARSE_ERROR"),
    (b"null", "UNKNOWN_EVENT"), (b"{}", "UNKNOWN_EVENT"), (b'{"type":"nope"}', "UNKNOWN_EVENT"), (b'{"type":"batch"}', "UNKNOWN_EVENT"),
    (b'{"type":["ack"]}', "UNKNOWN_EVENT"), (b'{"type":null}', "UNKNOWN_EVENT"), (b'{"type":"error"}', "UNKNOWN_EVENT"),
    (b'{"type":"subscribe"}', "INVALID_SUBSCRIBE"), (b'{"type":"subscribe","data":null}', "INVALID_SUBSCRIBE"),
    (b'{"type":"subscribe","data":[]}', "INVALID_SUBSCRIBE"), (b'{"type":"subscribe","data":"thr_t"}', "INVALID_SUBSCRIBE"),
    *((b'{"type":"subscribe","data":{"thread_id":"thr_t","from_seq":%s}}' % wrong, "INVALID_SUBSCRIBE")
      for wrong in (b'"1"', b"1.5", b"1.0", b"true", b"false", b'""', b"[]", b"{}", b"1e2")),
    (b'{"type":"subscribe","data":{"thread_id":1}}', "INVALID_SUBSCRIBE"),
    (b'{"type":"unsubscribe","data":{"thread_id":1}}', "INVALID_SUBSCRIBE"), (b'{"type":"unsubscribe"}', "INVALID_SUBSCRIBE"),
    (b'{"type":"ack"}', "INVALID_ACK"), (b'{"type":"ack","data":{"thread_id":"thr_t","ack_seq":"1"}}', "INVALID_ACK"),
    (b'{"type":"ack","data":{"thread_id":"thr_t","ack_seq":0.5}}', "INVALID_ACK"), (b'{"type":"ack","data":7}', "INVALID_ACK"),
    (b'{"type":"ack","data":{"thread_id":[],"ack_seq":1}}', "INVALID_ACK"),
    (b'{"type":"subscribe","data":{}}', "SUBSCRIBE_FAILED"), (b'{"type":"subscribe","data":{"thread_id":null}}', "SUBSCRIBE_FAILED"),
    (b'{"type":"subscribe","data":{"thread_id":"thr_nowhere","from_seq":4}}', "SUBSCRIBE_FAILED"),
    (b'{"type":"subscribe","data":{"thread_id":"\\ud800"}}', "SUBSCRIBE_FAILED"),
    (b'{"type":"subscribe","data":{"thread_id":"a\\u0000b"}}', "SUBSCRIBE_FAILED"),
    (b'{"type":"subscribe","data":{"thread_id":"%s"}}' % (b"t" * 9000), "SUBSCRIBE_FAILED"),
    (b'{"type":"ack","data":{}}', "ACK_FAILED"), (b'{"type":"ack","data":{"thread_id":"thr_nowhere","ack_seq":4}}', "ACK_FAILED"),
    (b'{"type":"ack","data":{"thread_id":"\\ud800","ack_seq":4}}', "ACK_FAILED"),
])
def test_what_is_wrong_is_answered_and_the_connection_stays(hall, client, said, code):
    """Case 11."""
    hall.send("thr_t")
    (answer,) = client.say(said)
    assert (answer["type"], answer["data"]["code"]) == ("error", code) and list(answer["data"]) == ["code", "message"]
    assert 0 < len(answer["data"]["message"]) < 400 and answer["data"]["message"].isprintable()
    assert [event["type"] for event in client.say({"type": "ping"})] == ["pong"] and not client.closed
    assert not client.stream.followed


def test_ping_and_what_is_ignored(hall, client):
    assert client.say({"type": "ping", "timestamp": "soon", "data": 5}) == [{"type": "pong", "timestamp": hall.world.at // 1_000_000}]
    assert client.say({"type": "pong"}) == []
    hall.send("thr_t")
    client.say({"type": "subscribe", "more": 1, "data": {"thread_id": "thr_t", "from_seq": None, "color": "red"}})
    client.pump()
    assert client.numbers("thr_t") == [1] and client.codes() == []


def test_an_instance_is_a_user_unless_it_says_otherwise(hall):
    assert Client(hall, "").stream.instance_id == "user"
    for wrong in ("a\nb", "x" * 257, "\ud800"):
        with pytest.raises(thrum.InvalidParams):
            Client(hall, wrong)
    assert len(hall.streams) == 1


# ---- subscribing

def test_an_empty_thread_is_confirmed_with_an_empty_batch_and_its_state(hall, client):
    """Case 1; a thread that only has a title, and one whose messages were all taken back."""
    (created,) = hall.emit(("thread.create", {"thread_id": "thr_t", "title": "Soon"}))
    batch, state = client.subscribe("thr_t")
    assert (batch["type"], batch["data"]) == ("batch", {"thread_id": "thr_t", "messages": [], "has_more": False})
    assert (state["type"], list(state["data"].items())) == ("thread_state", [
        ("thread_id", "thr_t"), ("status", "active"), ("last_seq", 0), ("updated_at", thrum.ns_of(created["timestamp"]) // 1_000_000)])
    hall.emit(("message.delete", {"message_id": hall.send("thr_u")}))
    batch, state = client.subscribe("thr_u")
    assert (batch["data"]["messages"], batch["data"]["has_more"], state["data"]["last_seq"]) == ([], False, 1)


@pytest.mark.parametrize("count", [1, 49, 50])
def test_up_to_fifty_come_in_one_batch(hall, client, count):
    """Case 2."""
    hall.fill("thr_t", count)
    batch, state = client.subscribe("thr_t")
    assert [row["message_seq"] for row in batch["data"]["messages"]] == to(1, count) and batch["data"]["has_more"] is False
    assert state["data"]["last_seq"] == count
    assert client.pump() is None and len(client.got) == 2


def test_the_fifty_first_follows_without_a_new_subscription(hall, client):
    """Case 2."""
    hall.fill("thr_t", 51)
    client.subscribe("thr_t")
    assert [(event["type"], len(event["data"].get("messages", ())), event["data"].get("has_more")) for event in client.got] == [
        ("batch", 50, True), ("thread_state", 0, None), ("message", 0, None)]
    assert client.numbers("thr_t") == to(1, 51)


@pytest.mark.parametrize(("from_seq", "numbers"), [
    (0, to(1, 10)), (5, to(6, 10)), (9, [10]), (10, []), (99, []), (-3, to(1, 10)), (-1, to(1, 10)), (10**30, []), (-10**30, to(1, 10))])
def test_from_seq_is_exclusive_and_clamped(hall, client, from_seq, numbers):
    """Case 3."""
    hall.fill("thr_t", 10)
    batch, state = client.subscribe("thr_t", from_seq)
    assert [row["message_seq"] for row in batch["data"]["messages"]] == numbers and not batch["data"]["has_more"]
    assert state["data"]["last_seq"] == 10
    hall.send("thr_t")
    assert client.numbers("thr_t") == [*numbers, 11]


def test_a_late_subscriber_gets_the_whole_past_and_hides_nothing(hall):
    """Case 4."""
    hall.fill("thr_t", 120)
    first, second = Client(hall), Client(hall, "bob")
    first.subscribe("thr_t", 120)
    hall.fill("thr_t", 3)
    second.subscribe("thr_t", 0)
    hall.fill("thr_t", 4)
    first.settle()
    second.settle()
    assert first.numbers("thr_t") == to(121, 127) and second.numbers("thr_t") == to(1, 127)


def test_a_second_subscribe_replaces_the_first(hall, client):
    hall.fill("thr_t", 8)
    client.subscribe("thr_t", 6)
    client.subscribe("thr_t", 2)        # rewinds
    assert client.numbers("thr_t") == [*to(7, 8), *to(3, 8)]
    client.subscribe("thr_t", 8)        # skips
    hall.send("thr_t")
    assert client.numbers("thr_t")[-1:] == [9] and len(client.numbers("thr_t")) == 9 and len(client.of("batch")) == 3


def test_unsubscribe_is_silent_and_ends_it(hall, client):
    hall.fill("thr_t", 120)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    client.step()                       # one batch of three
    assert client.say({"type": "unsubscribe", "data": {"thread_id": "thr_t"}}) == []
    assert client.say({"type": "unsubscribe", "data": {"thread_id": "thr_t"}}) == []
    hall.send("thr_t")
    assert client.settle().numbers("thr_t") == to(1, 50) and client.codes() == []
    assert not hall.streams._followed


def test_a_connection_follows_so_many_threads(hall, client):
    hall.send("thr_a")
    for number in range(thrum.FOLLOWED_MAX):
        hall.emit(("thread.create", {"thread_id": f"thr_{number}"}))
        client.say({"type": "subscribe", "data": {"thread_id": f"thr_{number}"}})
    assert client.subscribe("thr_a")[0]["data"]["code"] == "SUBSCRIBE_FAILED"
    client.say({"type": "subscribe", "data": {"thread_id": "thr_0"}})           # again is not one more
    client.say({"type": "unsubscribe", "data": {"thread_id": "thr_1"}})
    client.subscribe("thr_a")
    assert client.settle().numbers("thr_a") == [1] and client.codes() == ["SUBSCRIBE_FAILED"]


def test_a_lone_message_has_a_thread_that_its_answers_join(hall, client):
    lone = hall.send()
    thread = thrum.thread_of(lone)
    client.subscribe(thread)
    hall.send(thread, reply_to=lone)                    # as thrum answers
    other = hall.send()
    client.subscribe(thrum.thread_of(other))
    hall.send("thr_remote", reply_to=other)             # as the reference does: with an id of its own
    hall.send("thr_remote")
    client.settle()
    assert client.numbers(thread) == [1, 2] and client.numbers(thrum.thread_of(other)) == [1, 2, 3]
    late = Client(hall)
    late.subscribe("thr_remote")
    assert late.ids("thr_remote") == client.ids(thrum.thread_of(other))


def test_threads_that_are_joined_are_followed_by_either_id(hall, client):
    """The parent comes last, as from another machine: then what stood in two threads stands in one, in the order of the journal."""
    hall.fill("thr_b", 3)
    hall.emit(hall.message("thr_a", reply_to="msg_late"))
    hall.fill("thr_a", 2)
    client.subscribe("thr_a")
    client.subscribe("thr_b")
    assert (client.numbers("thr_a"), client.numbers("thr_b")) == (to(1, 3), to(1, 3))
    before = len(client.got)
    hall.emit(("message.create", {**hall.message("thr_b")[1], "message_id": "msg_late"}))
    client.settle()
    again = Client(hall)
    again.subscribe("thr_a")
    new = since(client, before)
    assert again.numbers("thr_a") == to(1, 7)
    assert new.ids("thr_a") == new.ids("thr_b") == again.ids("thr_a") and new.numbers("thr_a") == to(1, 7)
    hall.send("thr_a")
    hall.send("thr_b")
    hall.emit(("message.remove", {"message_ids": again.ids("thr_a")[:1]}))      # what is left is no new thread
    hall.send("thr_a")
    client.settle()
    new = since(client, before)
    assert new.numbers("thr_a") == new.numbers("thr_b") == to(1, 10)


def test_a_thread_that_is_joined_while_it_is_asked_for(hall, client):
    """The answer is of before, and not of the thread that there is now."""
    hall.fill("thr_b", 3)
    hall.emit(hall.message("thr_a", reply_to="msg_late"))
    client.say({"type": "subscribe", "data": {"thread_id": "thr_a"}})
    due = client.stream.due(hall.world.at)
    reply = hall.ask(due.handler, due.params)
    hall.emit(("message.create", {**hall.message("thr_b")[1], "message_id": "msg_late"}))
    client.stream.answered(due, reply, hall.world.at)
    assert client.settle().numbers("thr_a") == to(1, 5) and len(client.of("batch")) == 1


def test_a_thread_is_followed_through_its_names(hall, client):
    """By the id of a message in it, while it goes by smaller and smaller ids that others gave it."""
    lone = hall.send()
    thread = thrum.thread_of(lone)
    client.subscribe(thread)
    first = hall.send("thr_x", reply_to=lone)
    hall.fill("thr_w", 2)
    before = len(client.got)
    assert client.numbers(thread) == [1, 2]
    hall.send("thr_w", reply_to=first)
    client.settle()
    hall.send("thr_w")
    assert since(client.settle(), before).numbers(thread) == to(1, 6)


def test_an_older_message_that_joins_a_thread_is_sent(hall, client):
    lone = hall.send(content="older")
    hall.fill("thr_t", 3)
    client.subscribe("thr_t")
    before = len(client.got)
    hall.send("thr_t", reply_to=lone)           # as the reference puts it: the parent is in the thread of the answer
    client.settle()
    new = since(client, before)
    assert new.rows("thr_t")[0]["content"] == "older" and new.numbers("thr_t") == to(1, 5)
    hall.send("thr_t")
    assert since(client.settle(), before).numbers("thr_t") == to(1, 6)


# ---- live

def test_what_is_written_arrives_at_once_and_once(hall, client):
    """Cases 5 and 6: without a query, in order, though nothing is acknowledged; rows of one batch as one batch."""
    client.subscribe("thr_t") if hall.fill("thr_t", 5) else None
    asked = hall.asked
    hall.send("thr_t")
    hall.fill("thr_t", 3)
    assert (client.numbers("thr_t"), hall.asked) == (to(1, 9), asked)
    assert [event["type"] for event in client.got[2:]] == ["message", "batch"]
    for _ in range(3):
        assert client.settle().numbers("thr_t") == to(1, 9)
    hall.fill("thr_t", 120, batch=120)
    assert client.settle().numbers("thr_t") == to(1, 129)


def test_all_followers_of_a_thread_get_the_same_bytes(hall):
    clients = [Client(hall) for _ in range(20)]
    hall.fill("thr_t", 3)
    for one in clients:
        one.subscribe("thr_t")
        one.stopped = True
    hall.send("thr_t", author="bob", to=("cyd",))
    assert len({id(one.queue[0]) for one in clients}) == 1
    assert hall.streams._followed["thr_t"].keys() == {follow for one in clients for follow in one.stream.followed.values()}


@pytest.mark.parametrize("place", range(3))
def test_a_message_between_question_and_answer_is_not_lost_and_not_doubled(hall, client, place):
    """Written, and told, before the store is asked, while the answer is on its way, and right after it."""
    hall.fill("thr_t", 60)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    asked = 0
    while isinstance(due := client.stream.due(hall.world.at), thrum.Ask):
        sends = asked < 3
        asked += 1
        if place == 0 and sends:
            hall.send("thr_t")
        reply = hall.ask(due.handler, due.params)
        if place == 1 and sends:
            hall.send("thr_t")
        client.stream.answered(due, reply, hall.world.at)
        if place == 2 and sends:
            hall.send("thr_t")
    assert asked < 6
    assert client.settle().numbers("thr_t") == to(1, hall.ledger.store.thread_count("thr_t"))


def test_what_is_taken_back_is_skipped_and_leaves_a_gap(hall, client):
    """Case 19."""
    ids = hall.fill("thr_t", 6)
    hall.emit(("message.delete", {"message_id": ids[1]}), ("message.delete", {"message_id": ids[5]}))
    batch, state = client.subscribe("thr_t")
    assert client.numbers("thr_t") == [1, 3, 4, 5] and state["data"]["last_seq"] == 6 and not batch["data"]["has_more"]
    sent = hall.message("thr_t")
    hall.emit(sent, ("message.delete", {"message_id": sent[1]["message_id"]}), hall.message("thr_t"))     # at once
    assert client.numbers("thr_t") == [1, 3, 4, 5, 8]
    hall.emit(*(("message.delete", {"message_id": one}) for one in hall.fill("thr_u", 120)))
    hall.fill("thr_u", 2)
    client.subscribe("thr_u", 10)
    assert client.settle().numbers("thr_u") == [121, 122]


def test_large_messages_are_split_over_events(hall, client):
    hall.fill("thr_t", 12, content="x" * 60_000)
    client.subscribe("thr_t")
    client.settle()
    assert client.numbers("thr_t") == to(1, 12)
    assert all(len(json.dumps(batch)) < 300_000 for batch in client.of("batch")) and client.of("batch")[0]["has_more"] is True


# ---- acknowledgements

def stored(hall, thread, instance="tab"):
    """The number up to which a thread is acknowledged in the store."""
    hall.keep_acks()
    seq = hall.ledger.store.stream_ack(instance, thread)
    return seq and hall.ledger.store.thread_count(thread, seq)


def test_acknowledgements_only_rise_and_end_where_the_thread_does(hall, client):
    """Case 10."""
    hall.fill("thr_t", 10)
    client.subscribe("thr_t")
    assert client.ack("thr_t", 7) == client.ack("thr_t", 3) == []
    assert stored(hall, "thr_t") == 7
    client.ack("thr_t", 999)
    assert stored(hall, "thr_t") == 10
    for wrong in (-1, -10**30, 0, 10**30):
        assert client.ack("thr_t", wrong) == []
    hall.send("thr_t")
    assert client.numbers("thr_t") == to(1, 11) and stored(hall, "thr_t") == 10
    (error,) = client.ack("thr_u", 1)
    assert error["data"] == {"code": "ACK_FAILED", "message": "subscription not found: instance=tab thread=thr_u"}


def test_a_client_goes_on_where_it_has_acknowledged(hall, client):
    """from_seq -1, before and after the acknowledgement was kept, and after another thread's."""
    hall.fill("thr_t", 20)
    client.subscribe("thr_t")
    client.ack("thr_t", 7)
    client.leave()
    for _ in range(2):
        other = Client(hall)
        other.subscribe("thr_t", -1)
        assert other.numbers("thr_t") == to(8, 20)
        hall.keep_acks()
    other.ack("thr_t", 19)
    again = Client(hall)
    again.subscribe("thr_t", -1)
    assert again.numbers("thr_t") == [20]
    stranger = Client(hall, "bob")
    stranger.subscribe("thr_t", -1)
    assert stranger.numbers("thr_t") == to(1, 20)
    assert again.ack("thr_t", 3) == [] and stored(hall, "thr_t") == 19         # of an earlier connection


def test_a_row_of_an_earlier_connection_is_enough_for_an_acknowledgement(hall, client):
    hall.fill("thr_t", 10)
    client.subscribe("thr_t", 4)
    client.leave()
    other = Client(hall)
    assert other.ack("thr_t", 6) == [] and stored(hall, "thr_t") == 6
    assert other.ack("thr_t", 99) == [] and stored(hall, "thr_t") == 10
    assert other.ack("thr_t", -5) == [] and stored(hall, "thr_t") == 10
    assert not other.stream.followed and Client(hall, "bob").ack("thr_t", 1)[0]["data"]["code"] == "ACK_FAILED"


def test_what_was_acknowledged_ahead_is_not_sent(hall, client):
    hall.fill("thr_t", 180)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    client.step()
    client.ack("thr_t", 120)
    client.settle()
    assert client.numbers("thr_t") == [*to(1, 50), *to(121, 180)] and stored(hall, "thr_t") == 120
    hall.fill("thr_u", 80)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_u"}})
    due = client.stream.due(hall.world.at)
    while not isinstance(due, thrum.Ask):
        hall.world.at += int(due * SECOND) + 1
        due = client.stream.due(hall.world.at)
    client.ack("thr_u", 9999)                                   # while the first rows are on their way
    client.stream.answered(due, hall.ask(due.handler, due.params), hall.world.at)
    assert client.settle().numbers("thr_u") == to(1, 50) and stored(hall, "thr_u") == 80
    hall.send("thr_u")
    assert client.numbers("thr_u")[-1] == 81


def test_acknowledgements_are_collected(hall, client):
    """The daemon hears of the first, and keeps the last of each."""
    hall.fill("thr_t", 30)
    client.subscribe("thr_t")
    for number in range(1, 31):
        client.ack("thr_t", number)
    assert hall.kept == 1 and [ack[:2] for ack in hall.streams.take_acks()] == [("tab", "thr_t")]
    assert hall.streams.take_acks() == []


def test_only_so_many_acknowledgements_are_kept(hall, monkeypatch):
    monkeypatch.setattr(thrum, "STREAM_ACKS_MAX", 3)
    hall.send("thr_t")
    for number in range(6):
        hall.world.at += SECOND
        Client(hall, f"i{number}").subscribe("thr_t")
        Client(hall, "i0").subscribe("thr_t")       # is used
    kept = hall.ledger.store.db.execute("select instance_id from stream_acks order by instance_id").fetchall()
    assert kept == [("i0",), ("i4",), ("i5",)]


def test_an_acknowledgement_survives_a_purge(hall, client):
    """Numbers go on rising on a connection, and a journal's sequence is what is kept."""
    ids = hall.fill("thr_t", 60)
    client.subscribe("thr_t")
    client.settle()
    client.ack("thr_t", 55)
    hall.emit(("message.remove", {"message_ids": ids[:50], "reason": "deleted by scope"}))
    client.settle()
    hall.fill("thr_t", 2)
    assert client.numbers("thr_t") == to(1, 62)
    client.ack("thr_t", 61)
    hall.keep_acks()
    other = Client(hall)
    other.subscribe("thr_t", -1)
    assert [row["content"] for row in other.rows("thr_t")] == [client.rows("thr_t")[-1]["content"]] and other.numbers("thr_t") == [12]
    client.ack("thr_t", 62)
    assert stored(hall, "thr_t") == 12


# ---- rate, lag, turns

def test_a_thousand_without_acknowledgement_pause_a_thread_and_five_hundred_let_it_go_on(hall, client):
    """Case 8; other threads go on, nothing is said twice."""
    hall.fill("thr_u", 1)
    hall.fill("thr_t", 1001)
    client.subscribe("thr_u")
    client.subscribe("thr_t")
    assert len(client.of("thread_state")) == 2
    client.settle()
    assert client.numbers("thr_t") == to(1, 1000) and client.codes() == ["LAG_EXCEEDED"] and len(client.of("thread_state")) == 3
    text = client.of("error")[0]["message"]
    assert "thr_t" in text and "1,001" in text and "1,000" in text
    assert client.of("thread_state")[-1] == {**client.of("thread_state")[-1], "thread_id": "thr_t", "status": "active", "last_seq": 1001}
    hall.send("thr_t")
    hall.send("thr_u")
    client.ack("thr_t", 500)
    client.settle()
    assert client.numbers("thr_u") == [1, 2] and len(client.numbers("thr_t")) == 1000 and client.say({"type": "ping"})
    client.ack("thr_t", 501)
    assert client.settle().numbers("thr_t") == to(1, 1002) and client.codes() == ["LAG_EXCEEDED"]


def test_live_messages_pause_a_thread_too(hall, client):
    hall.fill("thr_t", 1)
    client.subscribe("thr_t", 1)
    for _ in range(1003):
        hall.world.at += SECOND // 20
        hall.send("thr_t")
        client.pump()
    assert client.numbers("thr_t") == to(2, 1001) and client.codes() == ["LAG_EXCEEDED"]
    client.ack("thr_t", 1003)           # ahead of what it was sent
    assert client.settle().numbers("thr_t") == [*to(2, 1001), 1004] and stored(hall, "thr_t") == 1003


def test_a_busy_thread_does_not_starve_others(hall, client):
    hall.fill("thr_u", 1)
    hall.fill("thr_t", 500)
    client.subscribe("thr_u", 1)
    client.subscribe("thr_t")
    for _ in range(1000):               # 100 a second, as much as may go out
        hall.world.at += SECOND // 100
        hall.send("thr_u")
        client.pump()
        client.ack("thr_u", (client.numbers("thr_u") or [0])[-1])
    assert len(client.numbers("thr_t")) == 500 and len(client.numbers("thr_u")) >= 400


def test_a_subscription_lifts_the_pause(hall, client):
    hall.fill("thr_t", 1100)
    client.subscribe("thr_t")
    client.settle()
    client.subscribe("thr_t", 1000)
    assert client.settle().numbers("thr_t") == to(1, 1100) and client.codes() == ["LAG_EXCEEDED"]


def test_a_long_past_is_caught_up_by_who_acknowledges(hall, client):
    hall.fill("thr_t", 3000)
    client.subscribe("thr_t")
    while (due := client.pump()) is not None:
        hall.world.at += int(due * SECOND) + 1
        client.ack("thr_t", client.numbers("thr_t")[-1])
    assert client.numbers("thr_t") == to(1, 3000) and client.codes() == []


def test_who_has_acknowledged_all_is_not_paused_by_what_was_taken_back(hall, client):
    """It cannot acknowledge what it was never sent."""
    hall.emit(*(("message.delete", {"message_id": one}) for one in hall.fill("thr_t", 2100)[100:]))
    client.subscribe("thr_t")
    client.settle()
    client.ack("thr_t", 100)
    hall.fill("thr_t", 3)
    assert client.settle().numbers("thr_t") == [*to(1, 100), *to(2101, 2103)] and client.codes() == []
    assert stored(hall, "thr_t") == 2100


def most_within(times, seconds):
    """How many of some times (ns) lie within so many seconds."""
    return max((bisect.bisect_left(times, at + seconds * SECOND) - i for i, at in enumerate(times)), default=0)


def test_no_connection_gets_more_than_the_rate(hall, client):
    """Case 9: from one thread or several, of which all is acknowledged."""
    hall.fill("thr_t", 2500, batch=250)
    hall.fill("thr_u", 700, batch=250)
    start = hall.world.at
    for thread in ("thr_t", "thr_u"):
        client.say({"type": "subscribe", "data": {"thread_id": thread}})
    while (due := client.pump()) is not None:
        hall.world.at += int(due * SECOND) + 1
        for thread in ("thr_t", "thr_u"):
            client.ack(thread, (client.numbers(thread) or [0])[-1])
    times = client.sent
    assert len(times) == 3200 and 100 < most_within(times, 1) <= 200 and most_within(times, 10) <= 1000
    assert times[99] == start and times[-1] - start < 33 * SECOND


def test_after_a_pause_a_burst_is_there_again(hall):
    rate = thrum.Rate(0)
    assert rate.room(0) == 100
    rate.spend(100, 0)
    assert rate.room(0) == 0 and rate.wait(50, 0) == 0.5 and rate.room(SECOND // 2) == 50
    assert rate.room(9 * SECOND) == 100
    rate.spend(60, 9 * SECOND + 1)      # the bucket was full, and ran over
    assert rate.room(9 * SECOND + 1) == 40
    assert rate.wait(100, 9 * SECOND + 1) == 0.6
    assert rate.room(5 * SECOND) <= 100 and rate.room(6 * SECOND) == 100        # a clock that was set back


def test_threads_take_turns(hall, client):
    for name in "abc":
        hall.fill(f"thr_{name}", 150)
        client.say({"type": "subscribe", "data": {"thread_id": f"thr_{name}"}})
    client.settle()
    assert [batch["thread_id"][-1] for batch in client.of("batch")] == list("abcabcabc")
    assert all(client.numbers(f"thr_{name}") == to(1, 150) for name in "abc")


def test_an_empty_thread_is_confirmed_at_once(hall, client):
    hall.fill("thr_t", 250)
    hall.emit(("thread.create", {"thread_id": "thr_e"}))
    client.subscribe("thr_t")
    assert [event["type"] for event in client.subscribe("thr_e")] == ["batch", "thread_state"]
    assert client.settle().numbers("thr_t") == to(1, 250)


def test_what_is_asked_and_what_is_live_share_the_rate(hall, client):
    hall.fill("thr_t", 50)
    hall.fill("thr_u", 1)
    client.subscribe("thr_u", 1)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    due = client.stream.due(hall.world.at)
    hall.fill("thr_u", 40)              # while the answer is on its way
    hall.fill("thr_u", 40)
    client.stream.answered(due, hall.ask(due.handler, due.params), hall.world.at)
    assert client.settle().numbers("thr_u") == to(2, 81) and client.numbers("thr_t") == to(1, 50)
    assert sum(at - client.sent[0] < SECOND // 100 for at in client.sent) <= 101


def test_a_live_row_waits_for_the_rows_before_it(hall, client):
    hall.fill("thr_t", 130)
    client.subscribe("thr_t")
    hall.send("thr_t")
    hall.fill("thr_u", 5)
    client.subscribe("thr_u")
    hall.send("thr_u")
    assert client.settle().numbers("thr_t") == to(1, 131) and client.numbers("thr_u") == to(1, 6)


# ---- clients that do not read

def test_rows_wait_for_who_does_not_read_and_arrive_without_a_gap(hall, client):
    """Case 7, as far as it has no socket."""
    hall.fill("thr_t", 2)
    client.subscribe("thr_t")
    client.stopped = True
    for _ in range(600):
        hall.world.at += SECOND // 100
        hall.send("thr_t", content="x" * 4096)
        client.pump()
    assert len(client.queue) == PLACES - thrum.STREAM_RESERVE and not client.closed
    client.stopped = False
    client.read()
    assert client.settle().numbers("thr_t") == to(1, 602)


def test_what_may_be_missed_is_dropped_and_counted_and_rows_are_not(hall):
    """Case 17."""
    hall.fill("thr_t", 2)
    stopped, live = Client(hall, "bob"), Client(hall, "cyd")
    for one in (stopped, live):
        one.subscribe("thr_t")
    stopped.stopped = True
    for number in range(1000):
        hall.call("task.report", task_id="t", stream_type="tool_use", tool_name="Bash", tool_input=str(number))
        if number % 10 == 0:
            hall.world.at += SECOND // 5
            hall.send("thr_t", author="ada", to=("ada",))
    stopped.stopped = False
    stopped.read()
    stopped.settle()
    live.settle()
    assert [event["event_seq"] for event in live.of("task_stream")] == to(1, 1000)
    assert 0 < len(stopped.of("task_stream")) < 1000
    assert stopped.stream.dropped == 1000 - len(stopped.of("task_stream")) == hall.streams.dropped
    assert stopped.numbers("thr_t") == live.numbers("thr_t") == to(1, 102) and not stopped.closed


def test_answers_have_places_of_their_own_and_then_the_connection_ends(hall, client):
    client.stopped = True
    for _ in range(300):
        hall.streams.tell("telemetry", {"instance_id": "x"}, hall.world.at)
    assert len(client.queue) == PLACES - thrum.STREAM_RESERVE
    for _ in range(thrum.STREAM_RESERVE):
        client.say({"type": "ping"})
    assert len(client.queue) == PLACES and not client.closed
    client.say({"type": "nope"})
    assert client.closed == 1008 and len(client.queue) == PLACES


def test_a_queue_that_filled_while_the_store_was_asked(hall, client):
    """The rows are asked for again; the confirmation has a reserved place."""
    hall.fill("thr_t", 60)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    for _ in range(2):
        due = client.stream.due(hall.world.at)
        reply = hall.ask(due.handler, due.params)
        client.stopped = True
        for _ in range(300):
            hall.streams.tell("telemetry", {"instance_id": "x"}, hall.world.at)
        client.stream.answered(due, reply, hall.world.at)
        client.stopped = False
        client.read()
    assert len(client.of("batch")) == 1 and client.numbers("thr_t") == to(1, 50)
    assert client.settle().numbers("thr_t") == to(1, 60) and client.of("thread_state")[0]["last_seq"] == 60


# ---- errors of the store

def test_a_query_that_fails_is_said_once_and_tried_again(hall, client):
    hall.fill("thr_t", 3)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    for failure in (OSError("/secret/path"), thrum.ThrumError("the query took longer than 10 s; ask for less")):
        due = client.stream.due(hall.world.at)
        client.stream.answered(due, failure, hall.world.at)
        wait = client.stream.due(hall.world.at)
        assert wait == thrum.STREAM_RETRY_S
        hall.world.at += int(wait * SECOND)
    assert client.codes() == ["FETCH_FAILED"] and "secret" not in client.of("error")[0]["message"]
    assert client.settle().numbers("thr_t") == [1, 2, 3]
    hall.send("thr_t")
    assert client.numbers("thr_t") == to(1, 4)
    hall.streams.publish(None, hall.world.at)
    client.stream.answered(client.stream.due(hall.world.at), OSError(), hall.world.at)
    assert client.codes() == ["FETCH_FAILED"] * 2           # another time


def test_a_clock_that_is_set_back_keeps_nobody_waiting(hall, client):
    hall.fill("thr_t", 120)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    client.stream.answered(client.stream.due(hall.world.at), OSError(), hall.world.at)
    hall.world.at -= 3600 * SECOND
    assert client.settle(5).numbers("thr_t") == to(1, 120)


def test_a_thread_that_fails_does_not_hold_up_others(hall, client):
    hall.fill("thr_t", 3)
    hall.fill("thr_u", 3)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    client.say({"type": "subscribe", "data": {"thread_id": "thr_u"}})
    client.stream.answered(client.stream.due(hall.world.at), OSError(), hall.world.at)
    assert client.pump() == thrum.STREAM_RETRY_S and client.numbers("thr_u") == to(1, 3)
    assert client.settle().numbers("thr_t") == to(1, 3)


def test_a_ledger_that_refuses_is_a_failed_subscription(hall, client):
    hall.fill("thr_t", 3)
    for event, code in (("subscribe", "SUBSCRIBE_FAILED"), ("ack", "ACK_FAILED")):
        ask = client.stream.take(json.dumps({"type": event, "data": {"thread_id": "thr_t"}}).encode(), hall.world.at)
        client.stream.answered(ask, thrum.ThrumError("the disk did not answer within 10 s"), hall.world.at)
        assert client.of("error")[-1] == {"code": code, "message": "the disk did not answer within 10 s"}
    assert not client.stream.followed


def test_news_that_could_not_be_worked_out_are_looked_for(hall, client):
    hall.fill("thr_t", 3)
    client.subscribe("thr_t")
    hall.holds = True
    hall.send("thr_t")
    hall.held.clear()
    assert client.pump() is None and client.numbers("thr_t") == to(1, 3)
    hall.streams.publish(None, hall.world.at)
    assert client.settle().numbers("thr_t") == to(1, 4)


# ---- states

def statuses(client, thread):
    return [(state["status"], state["last_seq"]) for state in client.of("thread_state") if state["thread_id"] == thread]


def test_a_state_is_told_when_status_or_title_change_and_not_otherwise(hall, client):
    asks = [{"type": "ask", "value": "?"}]
    client.subscribe("thr_t") if hall.send("thr_t") else None
    first = hall.send("thr_t", refs=asks)
    client.settle()
    assert statuses(client, "thr_t") == [("active", 1)]
    hall.send("thr_t", author="ada", reply_to=first)        # its own word is no answer
    assert Client(hall).subscribe("thr_t")[1]["data"]["status"] == "active"
    hall.send("thr_t", author="bob", reply_to=first)
    client.settle()
    assert statuses(client, "thr_t")[1:] == [("resolved", 4)]
    second = hall.send("thr_t", refs=asks)
    client.settle()
    assert statuses(client, "thr_t")[2:] == [("active", 5)]
    answer = hall.send("thr_t", author="bob", reply_to=second)
    client.settle()
    hall.emit(("message.delete", {"message_id": answer}))
    client.settle()
    hall.emit(("message.delete", {"message_id": second}))
    client.settle()
    assert [status for status, _ in statuses(client, "thr_t")[3:]] == ["resolved", "active", "resolved"]
    hall.emit(("thread.create", {"thread_id": "thr_t", "title": "Now"}))
    client.settle()
    assert len(statuses(client, "thr_t")) == 7
    hall.send("thr_t")
    assert client.settle().rows("thr_t")[-1]["subject"] == "Now" and len(statuses(client, "thr_t")) == 7


@pytest.mark.parametrize(("reason", "status"), [("archived", "archived"), ("deleted by scope", "deleted"), ("", "deleted")])
def test_a_thread_that_is_removed_says_so_and_is_unknown_then(hall, client, reason, status):
    """Case 21."""
    ids = hall.fill("thr_t", 3)
    hall.fill("thr_u", 3)
    client.subscribe("thr_t")
    client.subscribe("thr_u")
    hall.emit(("message.remove", {"message_ids": ids, "reason": reason}))
    client.settle()
    assert statuses(client, "thr_t") == [("active", 3), (status, 3)] and statuses(client, "thr_u") == [("active", 3)]
    assert client.subscribe("thr_t")[0]["data"]["code"] == "SUBSCRIBE_FAILED" and list(client.stream.followed) == ["thr_u"]
    hall.send("thr_u")
    assert client.numbers("thr_u") == to(1, 4)


def test_a_purge_and_a_deleted_agent_take_threads_away(hall, client):
    hall.emit(("thread.create", {"thread_id": "thr_e", "title": "Empty"}))
    hall.fill("thr_t", 3)
    hall.fill("thr_c", 2, author="cyd")
    lone = thrum.thread_of(hall.send())
    for thread in ("thr_t", "thr_c", "thr_e", lone):
        client.subscribe(thread)
    hall.emit(("agent.cleanup", {"agent_id": "cyd"}))
    client.settle()
    assert statuses(client, "thr_c")[1:] == [("deleted", 2)] and not statuses(client, "thr_t")[1:]
    hall.world.at += SECOND
    hall.emit(("purge.executed", {"cutoff": thrum.stamp_of(hall.world.at)}))
    client.settle()
    for thread, last in (("thr_t", 3), (lone, 1), ("thr_e", 0)):
        assert statuses(client, thread)[1:] == [("deleted", last)], thread
    assert not client.stream.followed and not hall.streams._followed


def test_a_thread_that_goes_before_it_was_confirmed_is_a_failed_subscription(hall, client):
    ids = hall.fill("thr_t", 3)
    client.say({"type": "subscribe", "data": {"thread_id": "thr_t"}})
    hall.emit(("message.remove", {"message_ids": ids}))
    client.settle()
    assert client.codes() == ["SUBSCRIBE_FAILED"] and not client.of("batch", "thread_state")


# ---- mail

def test_mail_is_told_to_readers_authors_and_people(hall):
    hall.emit(("agent.register", {"agent_id": "user:leon", "kind": "user", "role": "leon", "module": "ui"}))
    clients = {name: Client(hall, name) for name in ("ada", "bob", "cyd", "user:leon", "user", "nobody")}
    hall.send(content="\n  First line, which is as long as lines of mail may be, and longer \nsecond", author="ada", to=("bob",))
    assert {name for name, one in clients.items() if one.of("inbox_message")} == {"ada", "bob", "user:leon", "user"}
    (mail,) = clients["bob"].of("inbox_message")
    assert list(mail) == ["id", "message_id", "correlation_id", "from_agent", "to_inbox", "message_type", "title", "payload", "status",
                          "created_at"]
    assert mail == {**mail, "id": mail["message_id"], "correlation_id": thrum.thread_of(mail["id"]), "from_agent": "ada",
                    "to_inbox": "bob", "message_type": "notification", "title": "First line, which is as long as lines of mail may be"[:50],
                    "status": "unread", "created_at": hall.world.at // 1_000_000}
    assert all(one.of("inbox_message")[0]["to_inbox"] == "bob" for name, one in clients.items() if one.of("inbox_message"))
    hall.send(author="ada", to=("bob", "cyd", "user:leon"))
    last = {name: one.of("inbox_message")[-1]["to_inbox"] for name, one in clients.items() if len(one.of("inbox_message")) > 0}
    assert last == {"ada": "broadcast", "bob": "bob", "cyd": "cyd", "user:leon": "user:leon", "user": "broadcast"}
    assert [len(one.of("inbox_message")) for one in clients.values()] == [2, 2, 1, 2, 2, 0]


def test_mail_tells_questions_and_answers_apart(hall):
    bob = Client(hall, "bob")
    question = hall.send("thr_q", refs=[{"type": "ask", "value": "?"}])
    hall.send("thr_q", author="cyd", to=("bob",), reply_to=question)
    hall.send("thr_q", author="ada")
    first, second, third = bob.of("inbox_message")
    assert [mail["message_type"] for mail in (first, second, third)] == ["request", "response", "notification"]
    assert first["correlation_id"] == second["correlation_id"] == "thr_q"


def test_mail_that_was_taken_back_in_the_same_batch_is_not_told(hall):
    bob, message = Client(hall, "bob"), hall.message()
    hall.emit(message, ("message.delete", {"message_id": message[1]["message_id"]}))
    assert not bob.got


# ---- properties

@pytest.mark.parametrize("seed", range(40))
def test_every_subscriber_gets_every_row_once_and_in_order(hall, seed):
    """Whatever is sent, deleted, acknowledged, stalled, left and asked again meanwhile, and whatever is answered late."""
    rng = random.Random(seed)
    threads = ["thr_a", "thr_b", "thr_c"][:rng.randrange(1, 4)]
    ids = {thread: hall.fill(thread, rng.choice((1, 3, 49, 50, 51, 120))) for thread in threads}
    deleted, clients, asks = set(), [], {}
    begun = {}              # (client, thread) -> (where its subscription began in `got`, from_seq)

    def join():
        one = Client(hall, rng.choice(("ada", "bob", "user")), places=rng.choice((20, 40, PLACES)))
        clients.append(one)

    def visible(thread, after):
        return [(n, one) for n, one in enumerate(ids[thread], 1) if n > after]

    def check(one, thread, complete):
        start, after = begun[one, thread]
        rows = [(row["message_seq"], row["id"]) for row in since(one, start).rows(thread)]
        assert rows == sorted(set(rows)), f"{thread}: out of order, or twice"
        expected = visible(thread, after)
        assert not set(rows) - set(expected)
        kept = [pair for pair in expected if pair[1] not in deleted]
        if complete:
            assert [pair for pair in rows if pair[1] not in deleted] == kept
        else:               # no gap so far
            last = rows[-1][0] if rows else after
            assert [pair for pair in rows if pair[1] not in deleted] == [pair for pair in kept if pair[0] <= last]

    join()
    for turn in range(250):
        hall.world.at += rng.choice((0, 1, SECOND // 100, SECOND))
        step, one = rng.random(), rng.choice(clients)
        thread = rng.choice(threads)
        if step < 0.25:
            events = [hall.message(rng.choice(threads), author=rng.choice(("ada", "cyd"))) for _ in range(rng.choice((1, 1, 2, 7, 60)))]
            for _, fields in events:
                ids[fields["thread_id"]].append(fields["message_id"])
            hall.emit(*events)
        elif step < 0.30:
            victim = rng.choice(ids[thread])
            deleted.add(victim)
            hall.emit(("message.delete", {"message_id": victim}))
        elif step < 0.40 and not one.stopped:
            one.read()
            after = rng.choice((0, 0, len(ids[thread]), rng.randrange(len(ids[thread]) + 1), 10**6))
            one.say({"type": "subscribe", "data": {"thread_id": thread, "from_seq": after}})
            begun[one, thread] = len(one.got), min(after, len(ids[thread]))
        elif step < 0.50:
            part = one.numbers(thread)
            if part and thread in one.stream.followed:          # not ahead: that would skip messages
                one.ack(thread, min(one.stream.followed[thread].number, rng.choice((part[-1], rng.choice(part), part[-1] + 5))))
        elif step < 0.54:
            one.stopped = not one.stopped
            if not one.stopped:
                one.read()
        elif step < 0.57:
            join()
        elif step < 0.59 and len(clients) > 1:
            one.leave()
            clients.remove(one)
            asks.pop(one, None)
            begun = {key: value for key, value in begun.items() if key[0] is not one}
        elif step < 0.61:
            hall.holds = not hall.holds
            if not hall.holds:
                hall.tell()
        elif step < 0.64:
            hall.streams.tell("telemetry", {"instance_id": "x"}, hall.world.at)
        elif one in asks:               # the answer to what was asked before
            ask, reply = asks.pop(one)
            one.stream.answered(ask, reply, hall.world.at)
        elif not one.queue:
            due = one.stream.due(hall.world.at)
            if isinstance(due, thrum.Ask):
                asks[one] = due, hall.ask(due.handler, due.params)
        for key in begun if turn % 10 == 0 else ():
            check(*key, complete=False)
    hall.holds = False
    hall.tell()
    for one in clients:
        one.stopped = False
        one.read()
        if one in asks:
            ask, reply = asks.pop(one)
            one.stream.answered(ask, reply, hall.world.at)
        one.settle()
        assert not one.closed
    for one, thread in begun:
        for _ in range(3):
            one.ack(thread, (one.numbers(thread) or [0])[-1])
            one.settle()
        check(one, thread, complete=True)
    for one in clients:
        assert most_within(one.sent, 1) <= 200 and most_within(one.sent, 10) <= 1000
        one.leave()
    assert not hall.streams._followed and not hall.streams.streams and len(hall.streams) == 0


@pytest.mark.parametrize("resume", ["seen", "acknowledged"])
def test_reconnecting_under_a_writer_leaves_no_gap(hall, resume):
    """Case 16: with the last number seen, and with -1."""
    rng, seen = random.Random(resume), []
    hall.fill("thr_t", 30)
    for _ in range(20):
        one = Client(hall)
        one.subscribe("thr_t", -1 if resume == "acknowledged" else (seen[-1] if seen else 0))
        for _ in range(rng.randrange(5, 60)):
            hall.world.at += SECOND // 50
            hall.send("thr_t")
            one.pump()
            if rng.random() < 0.3 and one.numbers("thr_t"):
                one.ack("thr_t", one.numbers("thr_t")[-1])
            if rng.random() < 0.2:
                hall.keep_acks()
        got = one.numbers("thr_t")
        assert got == to(got[0], got[-1])
        if resume == "seen":
            assert got[0] == (seen[-1] + 1 if seen else 1)
        seen = sorted({*seen, *got})
        one.leave()
    assert seen == to(1, seen[-1]) and seen[-1] > 200


def test_no_batch_is_missed_whatever_is_told_when(hall):
    """The daemon tells of a batch before the answers to its requests, so a subscription in it may hear of it or not."""
    for seed in range(30):
        rng, thread = random.Random(seed), f"thr_{seed}"
        hall.fill(thread, rng.randrange(1, 4))
        one, now = Client(hall), hall.world.at
        ask = one.stream.take(json.dumps({"type": "subscribe", "data": {"thread_id": thread, "from_seq": 0}}).encode(), now)
        requests = [(lambda fields: lambda context: context.append("message.create", **fields))(hall.message(thread)[1])
                    for _ in range(rng.randrange(4))]
        requests.insert(rng.randrange(len(requests) + 1), lambda context, ask=ask: ask.handler(context, ask.params))
        place = next(outcome for outcome in hall.commit(*requests) if "number" in outcome)
        if rng.random() < 0.5:
            hall.send(thread)
        one.stream.answered(ask, place, now)
        hall.send(thread)
        one.settle()
        assert one.numbers(thread) == to(1, hall.ledger.store.thread_count(thread)), seed
        one.leave()


# ---- the loops

def test_the_loops_serve_a_connection(hall):
    """`hear_stream` and `serve_stream` with a clock, a ledger and a client that are none."""
    hall.fill("thr_t", 250)
    got, slept = [], []

    async def main():
        wake, full = asyncio.Event(), asyncio.Event()

        def send(payload, spare):
            got.append(json.loads(payload))
            if sum(len(e["data"].get("messages", "1")) for e in got if e["type"] in ("batch", "message")) >= 251:
                full.set()
            return True

        async def ask(handler, params):
            await asyncio.sleep(0)
            return hall.ask(handler, params)

        async def change(handler, params):
            outcome = hall.change(handler, params)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        async def wait(seconds):
            if seconds is None:
                await wake.wait()
            else:                       # time passes
                slept.append(seconds)
                hall.world.at += int(seconds * SECOND) + 1
                await asyncio.sleep(0)
            wake.clear()

        async def drained():
            await asyncio.sleep(0)

        stream = hall.streams.open("ada", hall.world.at, send, lambda code: None, wake.set)
        serving = asyncio.ensure_future(thrum.serve_stream(stream, ask, drained, wait, lambda: hall.world.at))
        for said in (b'{"type":"ping"}', b'{"type":"subscribe","data":{"thread_id":"thr_t"}}',
                     b'{"type":"subscribe","data":{"thread_id":"thr_none"}}', b'{"type":"ack","data":{"thread_id":"thr_none"}}'):
            await thrum.hear_stream(stream, said, change, lambda: hall.world.at)
        while sum(len(e["data"]["messages"]) for e in got if e["type"] == "batch") < 250:
            await asyncio.sleep(0)
        hall.send("thr_t")
        await asyncio.wait_for(full.wait(), 10)
        serving.cancel()
        await asyncio.wait({serving})

    asyncio.run(main())
    assert [e["data"]["code"] for e in got if e["type"] == "error"] == ["SUBSCRIBE_FAILED", "ACK_FAILED"]
    assert [e["type"] for e in got if e["type"] in ("pong", "batch", "thread_state")][:3] == ["pong", "batch", "thread_state"]
    assert len(slept) >= 3 and sum(slept) >= 1.49


def test_a_failing_question_does_not_end_the_loop(hall, caplog):
    hall.send("thr_t")
    got = []

    async def main():
        async def ask(handler, params):
            raise OSError("/secret")

        async def change(handler, params):
            return hall.change(handler, params)

        async def wait(seconds):
            assert seconds == thrum.STREAM_RETRY_S
            raise asyncio.CancelledError

        async def drained():
            pass

        stream = hall.streams.open("ada", hall.world.at, lambda payload, spare: got.append(json.loads(payload)) or True, None, lambda: None)
        await thrum.hear_stream(stream, b'{"type":"subscribe","data":{"thread_id":"thr_t"}}', change, lambda: hall.world.at)
        with pytest.raises(asyncio.CancelledError):
            await thrum.serve_stream(stream, ask, drained, wait, lambda: hall.world.at)

    asyncio.run(main())
    assert [event["data"]["code"] for event in got] == ["FETCH_FAILED"] and "stream_rows failed" in caplog.text


# ---- tasks

def report(hall, kind, task="t1", **fields):
    return hall.call("task.report", task_id=task, stream_type=kind, **fields)["event_seq"]


FULL = {"thread_id": "thr_t", "turn_num": 2, "text": "thinking", "tool_name": "Bash", "tool_input": "ls", "tool_output": "a.py",
        "error_msg": "no", "status": "running", "tokens_in": 5, "tokens_out": 6, "cost": 0.25, "duration_sec": 7, "workspace": "/w",
        "directive": "do", "directive_full": "do it", "agent_id": "ada", "source_type": "direct"}


def test_an_event_of_a_task_is_told_and_kept_with_the_contracts_fields(hall, client):
    hall.world.at += SECOND
    assert hall.call("task.report", task_id="t1", stream_type="status", **FULL, unknown=1) == {"success": True, "event_seq": 1}
    (event,) = client.got
    assert event["type"] == "task_stream" and list(event["data"]) == [
        "task_id", "thread_id", "stream_type", "turn_num", "text", "tool_name", "tool_input", "tool_output", "error_msg", "status",
        "tokens_in", "tokens_out", "cost", "duration_sec", "workspace", "directive", "directive_full", "agent_id", "source_type",
        "event_seq"]
    assert event["data"] == {"task_id": "t1", "stream_type": "status", **FULL, "event_seq": 1}
    assert hall.call("task.events", task_id="t1") == {
        "task_id": "t1", "events": [{**event["data"], "created_at": hall.world.at // 1_000_000}]}
    report(hall, "error", text="", turn_num=0, cost=0, caller_agent_id="bob")
    assert client.of("task_stream")[1] == {"task_id": "t1", "stream_type": "error", "agent_id": "bob", "event_seq": 2}


def test_long_texts_are_cut_live_and_kept_whole(hall, client):
    """By characters, not bytes."""
    for size in (999, 1000, 1001, 2000, 2001, 5000):
        fields = {"text": "é" * size, "tool_input": "漢" * size, "tool_output": "\U0001f600" * min(size, 4000)}
        for field, text in fields.items():
            report(hall, {"text": "text"}.get(field, "tool_use"), **{field: text})
            told, limit = client.of("task_stream")[-1][field], 1000 if field == "tool_input" else 2000
            assert told == (text if len(text) <= limit else text[:limit - 3] + "...")
            assert hall.call("task.events", task_id="t1", limit=1)["events"][0][field] == text


def test_texts_are_told_ten_a_second_and_all_are_kept_in_order(hall, client):
    """Case 18; for each task by itself, and nothing else is held back."""
    for number in range(20):
        report(hall, "text", text=f"x{number}")
        report(hall, "tool_use", tool_name="Read")
    report(hall, "text", task="t2", text="y")
    told = client.of("task_stream")
    assert [event["text"] for event in told if event["stream_type"] == "text" and event["task_id"] == "t1"] == [f"x{n}" for n in range(10)]
    assert sum(event["stream_type"] == "tool_use" for event in told) == 20 and told[-1]["task_id"] == "t2"
    kept = hall.call("task.events", task_id="t1", type="text")["events"]
    assert [event["text"] for event in kept] == [f"x{n}" for n in range(20)]
    assert [event["event_seq"] for event in kept] == list(range(1, 41, 2))
    hall.world.at += SECOND - 1
    report(hall, "text", text="too soon")
    hall.world.at += 1
    for number in range(11):
        report(hall, "text", text=f"z{number}")
    assert [event.get("text") for event in client.of("task_stream")][-11:] == ["y", *(f"z{n}" for n in range(10))]


@pytest.mark.parametrize(("wrong", "text"), [
    ({"stream_type": "nope"}, "stream_type must be one of status, turn_start"), ({"stream_type": ""}, "stream_type is required"),
    ({"task_id": ""}, "task_id is required"), ({"task_id": "a\nb"}, "task_id must be a text"), ({"task_id": "x" * 257}, "task_id must be"),
    ({"turn_num": -1}, "turn_num must not be negative"), ({"tokens_in": -1}, "tokens_in must not"), ({"cost": -0.5}, "cost must not be"),
    ({"cost": float("nan")}, "cost is out of range"), ({"cost": float("inf")}, "cost is out"), ({"cost": "1"}, "cost must be a number"),
    ({"cost": True}, "cost must be a number"), ({"turn_num": 1.5}, "turn_num must be an integer"),
    ({"text": "\ud800"}, "text is not valid"),
    ({"tool_name": "a\tb"}, "tool_name must be a text"), ({"agent_id": "a" * 300}, "agent_id must be"),
    ({"text": "x" * 65_536}, "65,583 bytes, the limit is 65,535"), ({"tool_output": "é" * 20_000}, "the limit is 65,535"),
])
def test_a_report_is_checked_and_a_refused_one_leaves_nothing(hall, client, wrong, text):
    with pytest.raises(thrum.ThrumError) as caught:
        hall.call("task.report", **{"task_id": "t1", "stream_type": "text", **wrong})
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert not client.got and not hall.call("task.list")["tasks"]


def test_the_largest_report_is_kept(hall):
    overhead = len(json.dumps({"task_id": "t1", "stream_type": "text", "text": ""}, separators=(",", ":")))
    assert report(hall, "text", text="x" * (thrum.LINE_MAX - overhead)) == 1


def run_task(hall, task="t1", agent="ada", end="completed"):
    steps = [("status", {"status": "running", "agent_id": agent, "thread_id": "thr_t", "workspace": "/w", "directive": "fix it"}),
             ("turn_start", {"turn_num": 1}), ("text", {"turn_num": 1, "text": "let me see\nand think"}),
             ("tool_use", {"turn_num": 1, "tool_name": "Bash", "tool_input": "ls"}),
             ("tool_result", {"turn_num": 1, "tool_name": "Bash", "tool_output": "a.py"}), ("turn_end", {"turn_num": 1}),
             ("turn_start", {"turn_num": 2}), ("tool_use", {"turn_num": 2, "tool_name": "Edit"}),
             ("error", {"turn_num": 2, "error_msg": "boom"}),
             ("status", {"status": end, "tokens_in": 1200, "tokens_out": 340, "cost": 0.125, "duration_sec": 95})]
    for kind, fields in steps:
        hall.world.at += SECOND
        report(hall, kind, task=task, **fields)
        yield hall.call("task.list")["tasks"][0]


def test_what_a_task_is_at_is_known_at_each_step(hall):
    seen = [(info["status"], info["turns"], info.get("tool_name"), info["events"]) for info in run_task(hall)]
    assert seen == [("running", 0, None, 1), ("running", 1, None, 2), ("running", 1, None, 3), ("running", 1, "Bash", 4),
                    ("running", 1, None, 5), ("running", 1, None, 6), ("running", 2, None, 7), ("running", 2, "Edit", 8),
                    ("running", 2, "Edit", 9), ("completed", 2, None, 10)]
    assert hall.call("task.list")["tasks"][0] == {
        "task_id": "t1", "status": "completed", "agent_id": "ada", "thread_id": "thr_t", "workspace": "/w", "directive": "fix it",
        "turns": 2, "tokens_in": 1200, "tokens_out": 340, "cost": 0.125, "duration_sec": 95, "events": 10,
        "started_at": "2026-03-10T09:15:01.001000001Z", "updated_at": thrum.stamp_of(hall.world.at)}


def test_a_task_is_replayed_as_events_text_or_summary(hall):
    list(run_task(hall))
    assert [event["stream_type"] for event in hall.call("task.events", task_id="t1", turn=2)["events"]] == [
        "turn_start", "tool_use", "error"]
    assert [event["event_seq"] for event in hall.call("task.events", task_id="t1", limit=3)["events"]] == [8, 9, 10]
    assert hall.call("task.events", task_id="t1", type="tool_use", limit=0)["events"][0]["tool_name"] == "Edit"
    assert hall.call("task.events", task_id="t1", format="text") == {"task_id": "t1", "text": (
        "[running]\n--- turn 1 ---\nlet me see\nand think\n> Bash ls\n< Bash a.py\n--- turn 1 ends ---\n--- turn 2 ---\n> Edit \n! boom\n"
        "[completed]: 1m, 1,200 tokens in, 340 out, $0.1250\n")}
    summary = hall.call("task.events", task_id="t1", format="summary")["summary"]
    assert summary == {**hall.call("task.list")["tasks"][0], "tools": {"Bash": 1, "Edit": 1}, "errors": ["boom"]}


@pytest.mark.parametrize(("params", "text"), [
    ({"task_id": "t9"}, "task not found: t9"), ({"task_id": "t1", "format": "xml"}, "format must be one of json, text, summary"),
    ({"task_id": "t1", "type": "nope"}, "type must be one of status")])
def test_a_replay_that_cannot_be_is_refused(hall, params, text):
    report(hall, "text", text="x")
    with pytest.raises(thrum.ThrumError) as caught:
        hall.call("task.events", **params)
    assert text in str(caught.value) and isinstance(caught.value, thrum.NotFound) == (params["task_id"] == "t9")


def test_tasks_are_listed_the_last_reported_first(hall):
    for number in range(4):
        hall.world.at += SECOND
        report(hall, "turn_start", task=f"t{number}", turn_num=1)
    hall.world.at += SECOND
    report(hall, "turn_end", task="t1", turn_num=1)
    assert [task["task_id"] for task in hall.call("task.list", limit=3)["tasks"]] == ["t1", "t3", "t2"]


def rows_in(hall, table):
    return hall.ledger.store.value(f"select count(*) from {table}")


def test_only_so_much_is_kept_of_tasks(hall, monkeypatch):
    for name, value in (("TASK_EVENTS_MAX", 6), ("TASK_ROWS_MAX", 20), ("TASKS_MAX", 4)):
        monkeypatch.setattr(thrum, name, value)
    assert [report(hall, "text", text="x") for _ in range(9)][-1] == 9
    assert [event["event_seq"] for event in hall.call("task.events", task_id="t1", limit=6)["events"]] == to(4, 9)
    for number in range(12):
        hall.world.at += SECOND
        for _ in range(6):
            report(hall, "text", task=f"n{number}", text="x")
        assert rows_in(hall, "tasks") <= 4 and rows_in(hall, "task_events") <= 20
    assert [task["task_id"] for task in hall.call("task.list")["tasks"]] == ["n11", "n10", "n9", "n8"]
    hall.world.at += thrum.REPORTS_S * SECOND
    report(hall, "text", task="new", text="x")
    assert [task["task_id"] for task in hall.call("task.list")["tasks"]] == ["new"] and rows_in(hall, "task_events") == 1


def test_reports_are_no_events_and_a_purge_takes_them(hall):
    last = hall.ledger.journal.last
    list(run_task(hall))
    hall.call("telemetry.report", pid=7)
    hall.send("thr_t")
    Client(hall).subscribe("thr_t")
    assert hall.ledger.journal.last == last + 1
    hall.world.at += SECOND
    hall.emit(("purge.executed", {"cutoff": thrum.stamp_of(hall.world.at)}))
    assert not hall.call("task.list")["tasks"] and not hall.call("telemetry.list")["instances"] and not rows_in(hall, "task_events")


# ---- telemetry

def test_telemetry_is_told_with_all_fields_and_its_defaults(hall, client):
    assert hall.call("telemetry.report", pid=77) == {"status": "ok"}
    assert list(client.got[0]["data"].items()) == [
        ("instance_id", "external_77"), ("pid", 77), ("turns", 0), ("tokens_in", 0), ("tokens_out", 0), ("cost", 0), ("status", "running"),
        ("duration_sec", 0)]
    said = {"instance_id": "ada", "pid": 1, "turns": 2, "tokens_in": 3, "tokens_out": 4, "cost": 0.5, "status": "completed",
            "duration_sec": 6}
    hall.call("telemetry.report", **said)
    assert client.of("telemetry")[1] == said
    for wrong in ({"turns": -1}, {"cost": -1}, {"status": "a\nb"}, {"instance_id": "x" * 300}, {"pid": "1"}):
        with pytest.raises(thrum.InvalidParams, match=next(iter(wrong))):
            hall.call("telemetry.report", **wrong)
    assert len(client.got) == 2


def test_the_last_hour_of_a_process_is_kept(hall):
    start = hall.world.at
    for number in range(1000):          # every ten seconds for nearly three hours
        hall.world.at = start + number * 10 * SECOND
        hall.call("telemetry.report", instance_id="ada", turns=number)
    hall.call("telemetry.report", instance_id="bob", turns=1)
    ada = hall.call("telemetry.list")["instances"][0]
    assert ada["instance_id"] == "ada" and ada["turns"] == 999 and ada["updated_at"] == thrum.stamp_of(hall.world.at)
    turns = [point["turns"] for point in ada["history"]]
    assert len(turns) == thrum.TELEMETRY_SLOTS and turns == sorted(turns) and turns[-1] == 999 and turns[-2] == turns[-3] + 3
    assert list(ada["history"][0]) == ["at", "turns", "tokens_in", "tokens_out", "cost"]
    assert [one["instance_id"] for one in hall.call("telemetry.list", limit=1)["instances"]] == ["ada"]


def test_only_so_many_processes_are_kept(hall, monkeypatch):
    monkeypatch.setattr(thrum, "TELEMETRY_MAX", 5)
    for number in range(12):
        hall.world.at += SECOND
        hall.call("telemetry.report", pid=number)
        assert rows_in(hall, "telemetry") <= 5
    assert [one["pid"] for one in hall.call("telemetry.list")["instances"]] == [11, 10, 9, 8, 7]
    hall.world.at += thrum.REPORTS_S * SECOND
    hall.call("telemetry.report", pid=99)
    assert [one["pid"] for one in hall.call("telemetry.list")["instances"]] == [99]


# ---- costs

@pytest.mark.parametrize(("sql", "index"), [
    ("select seq, deleted_at from messages where thread_id = ? and seq > ? order by seq", "COVERING INDEX messages_stream"),
    ("select count(*) from messages where thread_id = ? and seq > ?", "COVERING INDEX messages_stream"),
    ("select seq from messages where thread_id = ? and seq <= ? order by seq desc limit 1 offset ?", "COVERING INDEX messages_stream"),
    ("select max(at) from messages where thread_id = ?", "COVERING INDEX messages_thread"),
    (f"select count(*) from messages m where thread_id = ? and {thrum.ASKS} and deleted_at is null", "INDEX messages_asks"),
    (f"{thrum._MESSAGES} m.thread_id = ? and m.seq > ? and m.seq <= ? and m.deleted_at is null order by m.seq", "INDEX messages_stream"),
])
def test_questions_about_threads_go_by_an_index(hall, sql, index):
    plan = " ".join(row[-1] for row in hall.ledger.store.db.execute("explain query plan " + sql, ("x",) * sql.count("?")))
    assert index in plan and "SCAN" not in plan and "TEMP B-TREE" not in plan, plan


def test_nothing_is_worked_out_for_threads_that_nobody_follows(hall, client):
    hall.fill("thr_t", 3)
    client.subscribe("thr_t")
    got, asked = len(client.got), hall.asked
    hall.fill("thr_u", 500)
    assert client.pump() is None and (len(client.got), hall.asked) == (got, asked)
