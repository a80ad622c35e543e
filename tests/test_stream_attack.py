"""Thread streams under attack: what a client may say at any time, while others write, and while the daemon comes and goes."""

import os
import random
import select
import signal
import socket
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from streams import PASSING, Stream, call, calm, fill, make, messages_of, numbers, patched, thread_of
from wire import Refused

import thrum

END_S = 60                      # how long anything may take
# Limits so small that a few hundred rows meet them all; `test.append` writes events as another machine could have.
LAG, RESUME, BATCH = 60, 30, 7
PATCH = f"""
thrum.STREAM_RATE, thrum.STREAM_LAG, thrum.STREAM_RESUME, thrum.STREAM_BATCH = 2_000, {LAG}, {RESUME}, {BATCH}
def append(context, params):
    return context.append(params["type"], **params["fields"])
thrum.METHODS["test.append"] = thrum.Method(append, {{"type!": str, "fields!": dict}}, "Write an event.", writes=True)
"""
ACTIONS = ("subscribe",) * 2 + ("ack",) * 6 + ("wrong",) * 2 + ("ping", "frame", "unsubscribe") + ("listen",) * 4
WRONG = {                       # what to say, and the code of the answer
    "PARSE_ERROR": (b"{", b"[]", b"\x00", b'{"type":"ping"}}', b"nul", b'"subscribe"', b"[" * 5000),
    "UNKNOWN_EVENT": (b"{}", b"null", b'{"type":"batch"}', b'{"type":"pings"}', b'{"type":{}}', b'{"data":{"thread_id":"thr_x"}}'),
    "INVALID_SUBSCRIBE": (b'{"type":"subscribe"}', b'{"type":"subscribe","data":{"thread_id":1}}', b'{"type":"unsubscribe","data":[]}',
                          b'{"type":"subscribe","data":{"thread_id":"x","from_seq":1e3}}'),
    "INVALID_ACK": (b'{"type":"ack"}', b'{"type":"ack","data":{"thread_id":"x","ack_seq":"9"}}', b'{"type":"ack","data":"x"}'),
    "SUBSCRIBE_FAILED": (
        b'{"type":"subscribe","data":{"thread_id":"thr_no"}}', b'{"type":"subscribe","data":{"thread_id":"%s"}}' % (b"y" * 300),
        b'{"type":"subscribe","data":{"thread_id":"thr_\\u0000","from_seq":-1}}'),
    "ACK_FAILED": (b'{"type":"ack","data":{"thread_id":"thr_no","ack_seq":1}}', b'{"type":"ack","data":{"ack_seq":99999999999999999999}}')}
GONE = (ConnectionError, EOFError, Refused, FileNotFoundError)       # the daemon is not there


class Subscription:
    """What one subscription got; `begin` is after which number, None while that cannot be known, and then at most `most`."""

    def __init__(self, begin, most):
        self.begin, self.most, self.rows = begin, most, []
        self.acked = self.begin or 0
        self.said = 0           # what it acknowledged of what it had
        self.skipped = 0        # what was acknowledged before it came need not come
        self.confirmed = self.told = self.paused = False
        self.paused_at = -1     # how many rows it had then

    @property
    def last(self):
        return self.rows[-1][0] if self.rows else self.begin or 0

    def take(self, row):
        number = row["message_seq"]
        if self.begin is None:
            self.begin, self.acked = min(number - 1, self.most), max(self.acked, number - 1)
        assert number > self.last, f"{number} after {self.last}"
        if self.paused:
            assert self.last - self.acked + 1 <= RESUME, f"{number} while it is paused at {self.last}, acknowledged {self.acked}"
            self.paused = False
        self.rows.append((number, row["id"]))
        assert sum(number > self.acked for number, _ in self.rows) <= LAG, f"{number} when only {self.acked} are acknowledged"

    def pause(self):
        """It is told to be behind: once, until something came."""
        assert self.paused_at != len(self.rows), "it was said before"
        self.paused, self.told, self.paused_at = True, False, len(self.rows)


class Attacker(Stream):
    """A client that says anything, and holds what it gets against the rules.

    `stored` is thread -> (the highest number that it acknowledged and that the daemon heard of, the highest in all).
    """

    def __init__(self, repo, name, rng, threads, stored, ended):
        super().__init__(repo, name)
        self.rng, self.threads, self.stored, self.ended = rng, threads, stored, ended
        self.following = {}         # thread -> its Subscription
        self.errors, self.pings = [], 0

    def __exit__(self, *what):
        self.ended += self.following.items()
        super().__exit__(*what)

    def hear(self, event):
        kind, data = event["type"], event.get("data")
        if kind == "pong":
            self.pings -= 1
        elif kind == "error" and data["code"] == "LAG_EXCEEDED":
            (thread,) = [thread for thread in self.following if thread in data["message"]]
            self.following[thread].pause()
        elif kind == "error":
            self.errors.remove(data["code"])        # each was asked for
        elif kind == "thread_state":
            one = self.following[data["thread_id"]]
            assert one.confirmed and not one.told, "nothing has changed"
            one.told = True
        elif kind in ("batch", "message"):
            one, rows = self.following[data["thread_id"]], messages_of(event)
            assert len(rows) <= BATCH and (rows or not one.confirmed) and (one.confirmed or kind == "batch")
            one.confirmed = True
            for row in rows:
                one.take(row)
        else:
            assert kind in PASSING

    def listen(self, wait=0.0):
        """Hear what has come."""
        until = time.monotonic() + wait
        while self.ready or select.select([self.sock], [], [], max(0, until - time.monotonic()))[0]:
            self.hear(self.take())

    def await_answers(self):
        """Hear everything up to the answer to a ping: all that was said has had its answer by then."""
        self.say("ping")
        self.pings += 1
        while self.pings:
            self.hear(self.take())
        assert self.errors == []
        self.stored.update((thread, (max(low, one.said), high)) for thread, one in self.following.items()
                           for low, high in [self.stored.get(thread, (0, 0))])

    def follow(self, thread, from_seq):
        if thread in self.following:
            self.leave(thread)
        low, high = self.stored.get(thread, (0, 0))
        known = max((one.last for name, one in self.ended if name == thread), default=0)
        sure = -1 != from_seq <= known
        self.following[thread] = one = Subscription(max(0, from_seq) if sure else None, high if from_seq == -1 else from_seq)
        self.say("subscribe", thread_id=thread, from_seq=from_seq)
        while not one.confirmed:
            self.hear(self.take())
        assert not (from_seq == -1 and one.rows) or one.rows[0][0] > low, "what was acknowledged comes again"

    def leave(self, thread):
        self.say("unsubscribe", thread_id=thread)
        self.await_answers()
        self.ended.append((thread, self.following.pop(thread)))        # what comes of it now is a KeyError

    def acknowledge(self, thread, number):
        one = self.following[thread]
        if number > one.last:
            one.skipped = max(one.skipped, number)
        one.acked, one.said = max(one.acked, number), max(one.said, min(number, one.last))
        low, high = self.stored.get(thread, (0, 0))
        self.stored[thread] = low, max(high, number)
        self.ack(thread, number)

    def act(self):
        """Say something."""
        rng, thread, action = self.rng, self.rng.choice(self.threads), self.rng.choice(ACTIONS)
        one = self.following.get(thread)
        last = one.last if one else 0
        if action == "subscribe":
            self.follow(thread, rng.choice((0, -1, -1, -2, last, max(0, last - rng.randrange(20)), last + rng.randrange(5), 1 << 70)))
        elif action == "ack" and one:
            self.acknowledge(thread, rng.choice((last, last, last - rng.randrange(40), last + rng.randrange(3), 0)))
        elif action == "unsubscribe" and one:
            self.leave(thread)
        elif action == "wrong":
            code = rng.choice(sorted(WRONG))
            self.errors.append(code)
            self.send(rng.choice(WRONG[code]))
        elif action == "ping":
            self.await_answers()
        elif action == "frame":
            payload, parts = b'{"type":"ping","data":{"x":"' + "ä".encode() * rng.randrange(50) + b'"}}', []
            cuts = sorted(rng.randrange(len(payload)) for _ in range(rng.randrange(4)))
            for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(payload)])):
                kind = thrum.CONTINUATION if number else rng.choice((thrum.TEXT, thrum.BINARY))
                parts += [thrum.encode_frame(kind, payload[begin:end], fin=number == len(cuts), mask=os.urandom(4)),
                          thrum.encode_frame(thrum.PONG, b"", mask=b"mask")]
            self.pings += 1
            self.sock.sendall(b"".join(parts))
        else:
            self.listen(rng.random() * 0.05)
        self.listen()

    def vanish(self):
        """Go without a word, or worse."""
        if self.rng.random() < 0.5:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def finish(self, lengths):
        """Get the rest of all that there is."""
        until = time.monotonic() + END_S
        for thread in self.threads:
            self.follow(thread, -1)
        while behind := [thread for thread, one in self.following.items() if one.rows and one.last < lengths[thread]]:
            assert time.monotonic() < until, {thread: (self.following[thread].last, lengths[thread]) for thread in behind}
            for thread in behind:
                self.acknowledge(thread, self.following[thread].last)
            self.listen(0.02)
        self.await_answers()


def hold_against(truth, gone, thread, one):
    """A subscription got all rows from where it began to where it ended: `truth` are all ids, `gone` those that were taken back."""
    got = dict(one.rows)
    assert all(truth[number - 1] == message_id for number, message_id in got.items()), thread
    missing = [number for number in range(one.begin + 1, one.last) if number not in got and number > one.skipped
               and truth[number - 1] not in gone] if got else []
    assert not missing, (thread, one.begin, one.last, missing)


class Writers:
    """Threads of Python that write rows, reports and what else there is, until they are told to end; daemons may go and come."""

    def __init__(self, repo, threads, seed, count=2):
        self.repo, self.threads, self.done = repo, threads, threading.Event()
        self.sent, self.gone = [], set()            # (sequence, thread, id), and ids of what was taken back
        self.pool = ThreadPoolExecutor(count)
        self.running = [self.pool.submit(self.write, random.Random(f"{seed} {number}")) for number in range(count)]

    def call(self, method, **params):
        """The result of a call that may be repeated; None when it is refused then, because it was carried out before."""
        until, again = time.monotonic() + END_S, False
        while True:
            try:
                return call(self.repo, method, **params)
            except thrum.Unreachable:
                assert time.monotonic() < until
                again = True
                self.done.wait(0.02)
            except thrum.ThrumError:
                if not again:
                    raise
                return None

    def write(self, rng):
        while not self.done.wait(rng.choice((0, 0, 0.001, 0.02))):
            thread, size, what = rng.choice(self.threads), rng.choice((1, 5, 20, 400)), rng.random()
            done = self.call("message.send", content="x" * size, thread_id=thread, caller_agent_id="ada", send_key=uuid.uuid4().hex)
            self.sent.append((done["seq"], thread, done["message_id"]))
            if what < 0.05:
                self.gone.add(done["message_id"])   # before it is: somebody may look
                self.call("message.delete", message_id=done["message_id"], caller_agent_id="ada")
            elif what < 0.15:
                self.call("message.edit", message_id=done["message_id"], content="edited", caller_agent_id="ada")
            elif what < 0.25:
                self.call("task.report", task_id="t", stream_type=rng.choice(("text", "error")), text="y" * size)
                self.call("telemetry.report", pid=size)

    def end(self):
        """Let them end."""
        self.done.set()
        for one in self.running:
            one.result()
        self.pool.shutdown()

    def truth(self, threads):
        """Thread -> its ids in order, and thread -> the number of the last that was not taken back."""
        found = {thread: before + [message_id for _, name, message_id in sorted(self.sent) if name == thread]
                 for thread, before in threads.items()}
        return found, {thread: max(number for number, message_id in enumerate(all_of_it, 1) if message_id not in self.gone)
                       for thread, all_of_it in found.items()}


def scripted(thread, left):
    """A ThreadStream without sockets that follows a thread of so many messages, its Streams, and what it has sent."""
    sent, streams = [], thrum.Streams()
    stream = streams.open("user", 0, lambda payload, spare: sent.append(thrum.decode(payload)) or True, None, lambda: None)
    ask = stream.take(thrum.encode({"type": "subscribe", "data": {"thread_id": thread}}), 0)
    stream.answered(ask, {"thread": thread, "after": 0, "number": 0, "left": left}, 0)
    stream.answered(stream.due(0), page(thread, left), 0)
    return streams, stream, sent


def page(thread, count, reached=0, left=0):
    """The answer to a question for rows."""
    return {"thread": thread, "skipped": 0, "after": count, "passed": count, "left": left, "more": False, "reached": reached, "state": None,
            "rows": [(place, {"id": place}) for place in range(1, count + 1)]}


def test_an_acknowledgement_from_before_a_join_skips_nothing():
    streams, stream, sent = scripted("thr_a", 40)
    streams.publish(thrum.StreamNews([], [], set(), {"thr_a", "thr_b"}, ""), 0)
    assert stream.take(b'{"type":"ack","data":{"thread_id":"thr_a","ack_seq":40}}', 0) is None
    ask = stream.due(0)
    assert (ask.params["after"], ask.params["skip"]) == (0, 0)
    stream.answered(ask, page("thr_a", 45), 0)
    assert numbers(sent[-1]["data"]["messages"]) == list(range(1, 46))
    stream.take(b'{"type":"ack","data":{"thread_id":"thr_a","ack_seq":45}}', 0)
    assert streams.take_acks() == [("user", "thr_a", 45, 0)]


def test_what_was_written_under_another_name_before_it_was_known():
    """The answer that tells the name was read before the message was written, and comes after it was told."""
    streams, stream, sent = scripted("thr_b", 3)
    streams.publish(thrum.StreamNews([], [], set(), set(), "deleted"), 0)
    ask = stream.due(0)
    streams.publish(thrum.StreamNews([(9, "thr_c", {"thr_c"}, {"id": 4})], [], set(), set(), ""), 0)
    state = {"status": "active", "title": "", "updated_at": 0}
    stream.answered(ask, {**page("thr_c", 0, reached=8), "state": state}, 0)
    again = stream.due(0)
    assert isinstance(again, thrum.Ask), "it does not know that there is something"
    stream.answered(again, {**page("thr_c", 0, reached=9, left=1), "state": state}, 0)
    stream.answered(stream.due(0), {**page("thr_c", 1, reached=9), "rows": [(1, {"id": 4})]}, 0)
    assert (sent[-1]["data"]["message_seq"], sent[-1]["data"]["id"]) == (4, 4) and stream.due(0) is None


def prepare(tmp_path_factory, name, monkeypatch):
    """A repository without a daemon, and three threads in it: (repo, thread -> its ids)."""
    repo = make(tmp_path_factory, name, "ada", "bob")
    threads = dict(thread_of(repo, count) for count in (1, 80, 7))
    repo.ok("daemon", "stop")
    monkeypatch.setenv("THRUM_AUTOSTART", "0")          # only the one with our limits
    return repo, threads


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_anything_at_any_time(tmp_path_factory, monkeypatch, seed):
    """Some 300 things said by five clients, which come and go, while two write."""
    repo, threads = prepare(tmp_path_factory, f"any{seed}", monkeypatch)
    ended, lengths, quiet = [], {}, threading.Event()

    def attack(number):
        rng, stored, own = random.Random(f"{seed} {number}"), {}, []
        for _ in range(4):
            with Attacker(repo, f"client{number}", rng, [*threads], stored, own) as client:
                for _ in range(15):
                    client.act()
                client.await_answers()
                client.vanish()
        assert quiet.wait(END_S)
        with Attacker(repo, f"client{number}", rng, [*threads], stored, own) as client:
            client.finish(lengths)
        ended.extend(own)
    with patched(repo, PATCH), ThreadPoolExecutor(5) as pool:
        writers = Writers(repo, [*threads], seed)
        try:
            attacks = [pool.submit(attack, number) for number in range(5)]
            while len(writers.sent) < 300 and not any(one.done() for one in attacks):
                time.sleep(0.05)        # so much at least: the clients say more when they are quicker
        finally:
            writers.end()
            truth, found = writers.truth(threads)
            lengths.update(found)
            quiet.set()
        for one in attacks:
            one.result()
        assert len(ended) > 30 and sum(len(one.rows) for _, one in ended) > 500
        for thread, one in ended:
            hold_against(truth[thread], writers.gone, thread, one)
        calm(repo)
    repo.close()


def test_a_daemon_that_comes_and_goes(tmp_path_factory, monkeypatch):
    """Killed, stopped and killed again in the middle of it all; who comes back with -1 misses nothing."""
    repo, threads = prepare(tmp_path_factory, "kill", monkeypatch)
    ended, lengths, over, quiet = [], {}, threading.Event(), threading.Event()

    def attack(number):
        rng, stored, own, cut = random.Random(f"kill {number}"), {}, [], 0
        while not over.is_set():
            try:
                with Attacker(repo, f"client{number}", rng, [*threads], stored, own) as client:
                    for thread in threads:
                        client.follow(thread, -1)
                    while not over.is_set():
                        client.act()
            except GONE:
                cut += bool(own)
                stored.update((thread, (0, high)) for thread, (_, high) in stored.items())     # the last of it may be lost
                over.wait(0.02)
        assert quiet.wait(END_S)
        with Attacker(repo, f"client{number}", rng, [*threads], stored, own) as client:
            client.finish(lengths)
        ended.extend(own)
        return cut
    with ThreadPoolExecutor(4) as pool:
        writers = Writers(repo, [*threads], "kill")
        attacks = [pool.submit(attack, number) for number in range(4)]
        try:
            for number, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None), 1):
                with patched(repo, PATCH) as daemon:
                    until = time.monotonic() + END_S
                    while len(writers.sent) < 120 * number:
                        assert time.monotonic() < until and not any(one.done() for one in attacks)
                        time.sleep(0.02)
                    if how:
                        daemon.send_signal(how)
                        daemon.wait(END_S)
                        continue
                    writers.end()
                    over.set()
                    truth, found = writers.truth(threads)
                    lengths.update(found)
                    quiet.set()
                    assert min(one.result() for one in attacks) >= 3
                    calm(repo)
        finally:
            writers.done.set()
            over.set()
            quiet.set()
    assert sum(len(one.rows) for _, one in ended) > 500
    for thread, one in ended:
        hold_against(truth[thread], writers.gone, thread, one)
    repo.close()


class Keeper(Stream):
    """Follows threads from their beginning and acknowledges all; `got` has the ids since they last began anew, for each of them."""

    def __init__(self, repo, name, threads):
        super().__init__(repo, name)
        self.got, self.last, self.gone = {}, {}, set()
        for thread in threads:
            self.got[thread], self.last[thread] = [], 0
            self.say("subscribe", thread_id=thread, from_seq=0)

    def listen(self, wait=0.0):
        while self.ready or select.select([self.sock], [], [], wait)[0]:
            event = self.take()
            data = event["data"]
            if event["type"] in ("batch", "message"):
                thread = data["thread_id"]
                assert thread not in self.gone
                for row in messages_of(event):
                    if row["message_seq"] <= self.last[thread]:
                        assert row["message_seq"] == 1, "it begins anew where it began"
                        self.got[thread] = []
                    self.got[thread].append(row["id"])
                    self.last[thread] = row["message_seq"]
                self.ack(thread, self.last[thread])
            elif event["type"] == "thread_state" and data["status"] == "deleted":
                self.gone.add(data["thread_id"])
            elif event["type"] == "error" and data["code"] != "LAG_EXCEEDED":      # one that is gone before it was confirmed
                assert data["code"] == "SUBSCRIBE_FAILED"
                self.gone.add(data["message"].split()[-1])

    def has(self, thread, present):
        """Whether it got all that is present, in order and once."""
        kept = [message_id for message_id in self.got[thread] if message_id in set(present)]
        return kept == present and len(set(self.got[thread])) == len(self.got[thread])


def content(client, thread):
    """The ids in a thread, in the order of the journal."""
    found = client.call("message.list", page_size=500, thread_id=thread)["messages"]
    found = found or [one for one in client.call("message.list", page_size=500)["messages"] if one["message_id"][4:] == thread[4:]]
    return [one["message_id"] for one in sorted(found, key=lambda one: one["seq"])]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_that_are_joined_and_purged(tmp_path_factory, monkeypatch, seed):
    """Whatever becomes of threads, who follows one has got all that is in it, in the order in which it is there."""
    repo, known = prepare(tmp_path_factory, f"merge{seed}", monkeypatch)
    rng, world, stamps = random.Random(seed), thrum.World({}), []
    with patched(repo, PATCH), repo.client() as client:
        threads = [*known, *(thread_of(repo, count)[0] for count in (1, 2, 5))]
        listing = client.call("message.list", page_size=500)["messages"]
        messages = {message["message_id"]: message["created_at"] for message in listing}
        stamps = sorted(messages.values())
        with Keeper(repo, "keeper", threads) as keeper:
            for _ in range(150):
                what, thread = rng.random(), rng.choice(threads)
                if what < 0.06:             # an answer in one thread to a message in another one
                    event = {"message_id": world.new_id("msg"), "agent_id": "ada", "body": {"format": "plain", "content": "join"},
                             "thread_id": thread, "refs": [{"type": "reply_to", "value": rng.choice([*messages])}], "recipients": ["bob"]}
                    client.call("test.append", type="message.create", fields=event)
                elif what < 0.09:
                    del stamps[:rng.randrange(len(stamps) // 3 + 1)]
                    client.call("purge.execute", before=stamps[0])
                elif what < 0.12:
                    client.call("message.deleteByScope", scope_type="part", scope_value=str(rng.randrange(9)), caller_agent_id="ada")
                else:
                    try:
                        done = client.call("message.send", content="m", thread_id=thread, caller_agent_id="ada",
                                           scopes=[{"type": "part", "value": str(rng.randrange(9))}])
                    except thrum.ThrumError:        # it was purged
                        continue
                    messages[done["message_id"]] = done["created_at"]
                    stamps.append(done["created_at"])
                    if what < 0.2:
                        client.call("message.delete", message_id=done["message_id"], caller_agent_id="ada")
                keeper.listen()
            with Stream(repo, "truth") as fresh:
                for thread in threads:
                    fresh.say("subscribe", thread_id=thread, from_seq=1 << 60)
                    gone = fresh.next("batch", "error")["type"] == "error"
                    present = content(client, thread)
                    until = time.monotonic() + END_S / 4
                    while not (thread in keeper.gone or not gone and keeper.has(thread, present)):     # it may have come again
                        keeper.listen(0.05)
                        assert time.monotonic() < until, (thread, present, keeper.got[thread], keeper.gone)
        calm(repo)
    repo.close()


def test_a_lone_message_that_gets_a_thread_of_another_name(tmp_path_factory, monkeypatch):
    """Another machine's answer names a thread of its own: who follows the lone message follows that."""
    repo, _ = prepare(tmp_path_factory, "lone", monkeypatch)
    world = thrum.World({})
    with patched(repo, PATCH), repo.client() as client, Stream(repo) as page:
        lone = client.call("message.send", content="lone", caller_agent_id="ada")["message_id"]
        page.subscribe("thr_" + lone[4:])
        answer, other = world.new_id("msg"), world.new_id("thr")
        client.call("test.append", type="message.create", fields={
            "message_id": answer, "agent_id": "ada", "body": {"format": "plain", "content": "answer"}, "thread_id": other,
            "refs": [{"type": "reply_to", "value": lone}], "recipients": ["bob"]})
        (row,) = page.rows(1)
        assert (row["id"], row["message_seq"], row["thread_id"]) == (answer, 2, "thr_" + lone[4:])
        for number in (3, 4):
            sent = client.call("message.send", content="more", thread_id=other, caller_agent_id="ada")
            (row,) = page.rows(1)
            assert (row["id"], row["message_seq"]) == (sent["message_id"], number)
    repo.close()


def test_what_was_acknowledged_survives_a_stop(tmp_path_factory):
    """Also when the daemon has to wait for a client that does not answer its Close."""
    repo = make(tmp_path_factory, "stop", "ada")
    thread, _ = thread_of(repo, 5)
    with Stream(repo, "ada") as page:
        assert numbers(page.subscribe(thread)["messages"]) == [1, 2, 3, 4, 5]
        page.ping()
        page.ack(thread, 4)
        page.ping()
        call(repo, "daemon.stop")
        assert b"\x03\xe9" in page.sock.recv(1000)      # 1001, which it does not answer
        repo.ok("daemon", "start")
    fill(repo, thread, 1)
    with Stream(repo, "ada") as page:
        assert numbers(page.subscribe(thread, -1)["messages"]) == [5, 6]
    repo.close()
