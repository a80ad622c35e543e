"""What people and programs send into the socket that nobody should: the right code, others served, memory bounded.

One daemon for all tests, which checks after each that it is the same process and well.  What needs a daemon of its own
(limits shortened, disks that hang) is in test_daemon.py, the codec alone in test_jsonrpc.py.
"""

import contextlib
import json
import random
import shutil
import threading
import time

import pytest

import thrum
from conftest import Repo
from test_daemon import LONG, Raw, linux, memory, prepare, register, shape, sockets, until

PATIENCE_S = 5          # seconds in which somebody else must be answered, whatever one client does, on a slow machine
MEMORY = 64 << 20       # bytes that a hostile client may cost: some of the largest requests and their answers at once
HEALTH = b'{"jsonrpc":"2.0","id":%s,"method":"health"}'


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    path = tmp_path_factory.mktemp("robust")
    repo = Repo(path)
    repo.git("init", "-q", "-b", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "first")
    prepare(repo)
    with repo.client() as client:
        register(client, "ada", "bob")
    yield repo
    repo.close()
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def served(daemon):
    """The daemon, which must be as well afterwards as it was before."""
    with daemon.client() as client:
        before = client.call("health")
    yield daemon
    with daemon.client() as client:
        after = client.call("health")
    assert (after["pid"], after["status"], after["sync_state"], after["bad_lines"]) == (before["pid"], "ok", "ok", 0)
    while Raw.made:
        Raw.made.pop().close()


def flood(raw, data):
    """Send what the daemon may refuse to take."""
    with contextlib.suppress(OSError):
        raw.send(data)


class Bystander(threading.Thread):
    """Asks for health all the time on its own connection; `worst` is the longest that it waited, in seconds."""

    def __init__(self, repo):
        super().__init__(daemon=True)
        self.repo, self.worst, self.count, self.problem, self.over = repo, 0.0, 0, None, threading.Event()

    def run(self):
        try:
            with self.repo.client() as client:
                while not self.over.is_set() or not self.count:
                    begin = time.monotonic()
                    client.call("health")
                    self.worst, self.count = max(self.worst, time.monotonic() - begin), self.count + 1
        except Exception as error:
            self.problem = error

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *what):
        self.over.set()
        self.join(LONG)
        assert not self.problem and not self.is_alive() and self.worst < PATIENCE_S, (self.problem, self.worst)


# ---- every kind of value in every place

VALUES = [b"null", b"true", b"false", b"0", b"-1", b"1.5", b"1e400", b"-0", b"9" * 400, b'""', b'"x"', b'"\\ud800"', b'"\\u0000"',
          b"[]", b"[1]", b"{}", b'{"a":1}', b"[[]]", b"[null]", b'"' + b"x" * 5000 + b'"']
PLACES = [b'{"jsonrpc":%s,"id":1,"method":"health"}', b'{"jsonrpc":"2.0","id":%s,"method":"health"}',
          b'{"jsonrpc":"2.0","id":1,"method":%s}', b'{"jsonrpc":"2.0","id":1,"method":"message.get","params":%s}',
          b'{"jsonrpc":"2.0","id":1,"method":"message.get","params":{"message_id":%s}}',
          b'{"jsonrpc":"2.0","id":1,"method":"message.markRead","params":{"caller_agent_id":"ada","message_ids":%s}}',
          b'{"jsonrpc":"2.0","id":1,"method":"message.list","params":{"page":%s,"page_size":%s,"scope":%s,"after_seq":%s}}',
          b'{"jsonrpc":"2.0","id":1,"method":"message.send","params":{"caller_agent_id":"ada","content":"x","structured":%s,"mentions":%s}}',
          b"%s", b"[%s]", b'[{"jsonrpc":"2.0","id":%s,"method":"health"},%s]']


@pytest.mark.parametrize("place", PLACES, ids=[place.decode()[:70] for place in PLACES])
def test_any_value_anywhere_is_answered(served, place):
    """Each line gets at most one answer, of the right form; never an internal error; the connection goes on."""
    with Raw(served) as raw:
        for value in VALUES:
            line = place.replace(b"%s", value)
            raw.send(line + b"\n" + HEALTH % b'"sentinel"' + b"\n")
            replies = []
            while (reply := raw.reply()) is not None and not (isinstance(reply, dict) and reply.get("id") == "sentinel"):
                replies.append(reply)
            assert reply is not None and len(replies) <= 1, line
            for one in replies[0] if replies and isinstance(replies[0], list) else replies:
                shape(one)
                code = one.get("error", {}).get("code")
                assert code in (None, -32700, -32600, -32601, -32602, -32000), (line, one)


def test_ids_come_back_as_they_were(served):
    """Strings, numbers and null, in calls, in batches and with errors; what is no id is answered with null."""
    ids = ["", "a", "é漢\U0001f600", '"\\', "x" * 1000, 0, -1, 1.5, 2**53, 2**64, -2**63, None]
    with Raw(served) as raw:
        for method, code in (("health", "ok"), ("nope.x", -32601)):
            for id in ids:
                assert shape(raw.send(json.dumps({"jsonrpc": "2.0", "id": id, "method": method}).encode() + b"\n").reply()) == (id, code)
            batch = [{"jsonrpc": "2.0", "id": id, "method": method} for id in ids]
            assert [shape(one) for one in raw.send(json.dumps(batch).encode() + b"\n").reply()] == [(id, code) for id in ids]
        for id in (True, [], {}, [1], {"a": 1}):
            reply = raw.send(json.dumps({"jsonrpc": "2.0", "id": id, "method": "health"}).encode() + b"\n").reply()
            assert shape(reply) == (None, -32600), id


def test_of_equal_keys_the_last_counts(served):
    with Raw(served) as raw:
        reply = raw.send(b'{"id":1,"jsonrpc":"1.0","jsonrpc":"2.0","method":"x","method":"message.list",'
                         b'"params":7,"params":{"page":7,"page":2},"id":2}\n').reply()
        assert reply["id"] == 2 and reply["result"]["page"] == 2


@pytest.mark.parametrize("line", [
    "\ufeff".encode() + HEALTH % b"1", (HEALTH % b"1").decode().encode("utf-16"), b"\0" + HEALTH % b"1", HEALTH % b"1" + b"\0",
    HEALTH % b"1" + b"//", b"'" + HEALTH % b"1" + b"'", b"{'jsonrpc':'2.0'}", b'{"jsonrpc":"2.0","id":01,"method":"health"}',
    b'{"jsonrpc":"2.0","id":1,"method":"health",}', b'{"jsonrpc":"2.0","id":1,"method":"he\tlth"}', b"\xc0\x80", b"\xed\xa0\x80",
    b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', b"[" * 900 + b"]" * 901, b'"', b"-", b"1e", b"tru", b"\\u0041", b"\x7f",
], ids=repr)
def test_what_is_no_json_is_told_so(served, line):
    assert b"\n" not in line
    with Raw(served) as raw:
        assert shape(raw.send(line + b"\n").reply()) == (None, -32700)
        assert shape(raw.send(HEALTH % b"2" + b"\n").reply()) == (2, "ok"), "the connection goes on"


def test_deep_nesting_harms_nobody(served):
    """As deep as a line is long: refused as unreadable, or ignored where nobody looks; in a payload refused by name."""
    deep = (thrum.REQUEST_MAX - 200) // 12
    with Raw(served) as raw, Bystander(served):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            value = opening * deep + b"1" + closing * deep
            for line in (value, b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"x":%s}}' % value,
                         b'{"jsonrpc":"2.0","id":1,"method":"message.send","params":{"caller_agent_id":"ada","content":"x",'
                         b'"structured":{"a":%s}}}' % value):
                reply = raw.send(line + b"\n").reply()
                assert shape(reply)[1] in (-32700, -32600, -32602), shape(reply)
        for depth in (10, 100, 500):
            line = b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"x":%s}}' % (b"[" * depth + b"]" * depth)
            assert shape(raw.send(line + b"\n").reply()) == (1, "ok")


def test_huge_numbers_harm_nobody(served):
    """Numbers that take minutes to convert, or that no column holds, are refused or ignored within a moment."""
    with Raw(served) as raw, Bystander(served):
        for number in (b"9" * 4299, b"9" * 5000, b"9" * 500_000, b"-" + b"9" * 500_000, b"1e" + b"9" * 300, b"1." + b"9" * 500_000,
                       b"0." + b"0" * 500_000 + b"1", b"1e-999999"):
            for place in (b'{"jsonrpc":"2.0","id":%s,"method":"health"}',
                          b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"x":%s}}',
                          b'{"jsonrpc":"2.0","id":1,"method":"message.list","params":{"page":%s}}'):
                reply = raw.send(place % number + b"\n").reply()
                assert shape(reply)[1] in ("ok", -32700, -32600, -32602), (number[:20], reply)


# ---- many at once

def test_hundreds_of_calls_in_one_write_are_answered_in_order(served):
    """Good ones, bad ones, notifications and batches mixed; half-closed after the last, still all answers and then the end."""
    lines, expected = [], []
    for number in range(600):
        kind = number % 6
        if kind == 0:
            lines.append(HEALTH % b"%d" % number)
            expected.append((number, "ok"))
        elif kind == 1:
            lines.append(b'{"jsonrpc":"2.0","id":%d,"method":"nope.x"}' % number)
            expected.append((number, -32601))
        elif kind == 2:
            lines.append(b'{"jsonrpc":"2.0","method":"health"}')
        elif kind == 3:
            lines.append(b"not JSON %d" % number)
            expected.append((None, -32700))
        elif kind == 4:
            lines.append(b'[{"jsonrpc":"2.0","id":%d,"method":"agent.list"},1,{"jsonrpc":"2.0","method":"health"}]' % number)
            expected.append([(number, "ok"), (None, -32600)])
        else:
            lines.append(b'{"jsonrpc":"2.0","id":%d,"method":"message.send","params":{"caller_agent_id":"ada","content":"p",'
                         b'"mentions":["@bob"]}}' % number)
            expected.append((number, "ok"))
    with Raw(served) as raw, Bystander(served):
        raw.send(b"\n".join(lines) + b"\n").end_of_writing()
        replies = []
        while (reply := raw.reply()) is not None:
            replies.append(shape(reply))
    assert replies == expected


def test_writes_then_reads_of_one_pipeline_see_each_other(served):
    """Each call of a connection sees what those before it did, though all came at once."""
    with Raw(served) as raw:
        for number in range(50):
            raw.call("message.send", id=2 * number, content=f"seen {number}", mentions=["@bob"], caller_agent_id="ada")
            raw.call("message.list", id=2 * number + 1, for_agent="bob", page_size=1)
        raw.end_of_writing()
        for _ in range(50):
            sent, listed = raw.reply(), raw.reply()
            assert listed["result"]["messages"][0]["message_id"] == sent["result"]["message_id"]


def test_a_wait_in_a_pipeline_is_answered_in_its_place(served):
    with Raw(served) as raw, served.client() as client:
        raw.call("message.wait", id=1, caller_agent_id="bob", after_seq=client.call("health")["last_seq"], timeout_ms=20_000)
        raw.call("health", id=2).end_of_writing()
        client.call("message.send", content="now", mentions=["@bob"], caller_agent_id="ada")
        assert [shape(raw.reply()) for _ in range(2)] == [(1, "ok"), (2, "ok")] and raw.reply() is None


@linux
def test_waits_whose_clients_went_away_end(served):
    """A hundred clients that wait and leave: their connections are gone soon, not when the wait would end."""
    with served.client() as client:
        pid = client.call("health")["pid"]
        before = sockets(pid)
        for _ in range(100):
            with Raw(served) as raw:
                raw.call("message.wait", caller_agent_id="bob", timeout_ms=600_000)
        client.call("message.send", content="for nobody who waits", mentions=["@bob"], caller_agent_id="ada")
        until(lambda: sockets(pid) <= before, "the connections of those who left are closed")


# ---- floods

@linux
@pytest.mark.parametrize("data", [b"\n", b"{}\n", b"[]\n", b"0\n", b'{"jsonrpc":"2.0","method":"health"}\n', HEALTH % b"1" + b"\n"],
                         ids=["empty lines", "objects", "empty batches", "numbers", "notifications", "calls"])
def test_a_flood_that_nobody_reads_costs_a_bounded_sum(served, data):
    """Up to 4 MiB of tiny lines, each with an answer larger than itself, from a client that does not read."""
    with served.client() as client:
        pid = client.call("health")["pid"]
    before = memory(pid)
    with Bystander(served) as bystander, Raw(served) as raw:
        raw.sock.settimeout(1)
        flood(raw, data * ((4 << 20) // len(data)))
        until(lambda: bystander.count > 3, "others are served meanwhile")
        assert memory(pid) - before < MEMORY


def test_a_flood_that_is_read_delays_nobody(served):
    """A client that sends a MiB of the cheapest errors and takes all answers does not keep the daemon for itself."""
    count = 1 << 20
    with Bystander(served), Raw(served) as raw:
        writing = threading.Thread(target=flood, args=(raw, b"\n" * count), daemon=True)
        writing.start()
        left = count // 8           # as many as show it
        while left > 0:
            data = raw.sock.recv(1 << 20)
            assert data
            left -= data.count(b"\n")


@linux
def test_a_flood_of_garbage_costs_a_bounded_sum(served):
    """1 MiB and more without a newline, of zeros, of noise and of JSON that never ends; from several at once."""
    noise = random.Random(7).randbytes(1 << 20) if hasattr(random.Random, "randbytes") else bytes(range(256)) * 4096
    with served.client() as client:
        pid = client.call("health")["pid"]
    before = memory(pid)
    with Bystander(served):
        for garbage in (b"\1" * (1 << 20), noise.replace(b"\n", b" ").replace(b"C", b"c"), b'{"a":"' + b"x" * (1 << 20),
                        b"[" + b"1," * (1 << 19)):
            raws = [Raw(served) for _ in range(4)]
            for raw in raws:
                flood(raw, b"x" + garbage)
            for raw in raws:
                reply = raw.reply()
                assert reply is None or shape(reply) == (None, -32600)
                raw.close()
    assert memory(pid) - before < MEMORY


def test_binary_garbage_with_newlines_gets_an_error_per_line(served):
    """Noise is lines like any other: each one an error, and the connection still answers."""
    rng = random.Random(11)
    for _ in range(20):
        lines = [bytes(rng.choice(b"\x00\x01\x7f\x80\xfe\xff{}[]\",:0") for _ in range(rng.randrange(1, 200))) for _ in range(20)]
        with Raw(served) as raw:
            raw.send(b"x\n" + b"\n".join(lines) + b"\n" + HEALTH % b'"end"' + b"\n")
            replies = []
            while (reply := raw.reply()) is not None and not (isinstance(reply, dict) and reply["id"] == "end"):
                replies.append(reply)
            assert reply and reply["result"]["status"] == "ok" and len(replies) == 21
            for one in replies:
                for single in one if isinstance(one, list) else [one]:
                    assert shape(single)[1] in (-32700, -32600)


def test_the_limit_of_a_line_to_the_byte(served):
    """REQUEST_MAX bytes are read, also with CRLF and in small pieces; one more is refused before it ends, and that is the end."""
    line = b'{"jsonrpc":"2.0","id":1,"method":"health","params":{"x":"%s"}}'
    full = line % (b"x" * (thrum.REQUEST_MAX - len(line) + 2))
    assert len(full) == thrum.REQUEST_MAX
    with Raw(served) as raw:
        assert shape(raw.send(full + b"\n" + HEALTH % b"2" + b"\n").reply()) == (1, "ok")
        assert shape(raw.reply()) == (2, "ok")
        for start in range(0, len(full), 100_000):
            raw.send(full[start:start + 100_000])
        assert shape(raw.send(b"\n").reply()) == (1, "ok")
        flood(raw, full + b"x")
        assert shape(raw.reply()) == (None, -32600) and raw.reply() is None, "no newline is needed to know it"
    with Raw(served) as raw:
        flood(raw, HEALTH % b"1" + b"\n" + full + b"x\n")
        assert [shape(raw.reply()) for _ in range(2)] == [(1, "ok"), (None, -32600)], "what came before is answered"


def test_a_batch_as_long_as_a_line(served):
    """One line may hold many items, but not more calls than BATCH_CALLS_MAX, whatever they are."""
    with Raw(served) as raw:
        for items in (b"1," * 400_000 + b"1", b"[]," * 300_000 + b"[]", b"{}," * 300_000 + b"{}"):
            assert shape(raw.send(b"[" + items + b"]\n").reply()) == (None, -32600)
        assert shape(raw.send(HEALTH % b"1" + b"\n").reply()) == (1, "ok")


def test_half_sent_requests_of_many_delay_nobody(served):
    """Vector 36 with more: a hundred clients that send one byte each and stay."""
    with Bystander(served):
        raws = [Raw(served).send(b"{") for _ in range(100)]
        for number, raw in enumerate(raws):
            raw.send((HEALTH % b"%d" % number)[1:] + b"\n")
        assert [shape(raw.reply()) for raw in raws] == [(number, "ok") for number in range(100)]


def test_after_all_this_mail_still_goes_through(served):
    with served.client() as client:
        sent = client.call("message.send", content="still here", mentions=["@bob"], caller_agent_id="ada")
        assert client.call("message.list", for_agent="bob", page_size=1)["messages"][0]["message_id"] == sent["message_id"]
