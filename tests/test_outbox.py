"""What waits for slow and silent clients, with a loop and a transport that a test moves."""

import asyncio

import pytest

import thrum


class FakeLoop:
    def __init__(self):
        self.now, self.timers = 1000.0, []

    def time(self):
        return self.now

    def call_at(self, when, function, *args):
        timer = FakeTimer(when, function, args)
        self.timers.append(timer)
        return timer

    def call_later(self, delay, function, *args):
        return self.call_at(self.now + delay, function, *args)

    def pass_s(self, seconds):
        """Let time go by, and call what falls due in it, in order."""
        until = self.now + seconds
        while due := sorted((timer for timer in self.timers if timer.when <= until), key=lambda timer: timer.when):
            self.timers.remove(due[0])
            self.now = max(self.now, due[0].when)
            due[0].function(*due[0].args)
        self.now = until


class FakeTimer:
    def __init__(self, when, function, args):
        self.when, self.function, self.args = when, function, args
        self.loop = None

    def cancel(self):
        self.function = lambda *args: None


class FakeTransport:
    """Takes `takes` bytes at once; the rest waits until `read`."""

    def __init__(self, takes=0):
        self.takes, self.sent, self.waiting, self.aborted, self.closing = takes, b"", b"", False, False

    def write(self, data):
        assert not self.closing
        self.waiting += data
        self.read(0)

    def read(self, size):
        self.takes += size
        taken, self.waiting = self.waiting[:self.takes], self.waiting[self.takes:]
        self.takes -= len(taken)
        self.sent += taken

    def get_write_buffer_size(self):
        return len(self.waiting)

    def is_closing(self):
        return self.closing or self.aborted

    def abort(self):
        self.aborted, self.waiting = True, b""


class FakeWriter:
    def __init__(self, transport):
        self.transport = transport

    def close(self):
        self.transport.closing = True

    async def drain(self):
        while self.transport.waiting:
            await asyncio.sleep(0)          # until somebody has called `read` and sends the coroutine on


@pytest.fixture
def loop(monkeypatch):
    loop = FakeLoop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


def client(kind=thrum.WebConnection, takes=0):
    connection = kind(None, 0.0, FakeWriter(FakeTransport(takes)))
    if kind is thrum.WebConnection:
        connection.upgrade(1000)
    return connection, connection.outbox.writer.transport


def test_who_reads_is_never_behind(loop):
    connection, transport = client(takes=1 << 30)
    for n in range(10_000):
        connection.push(b"%d" % n)
    assert not connection.silent and transport.sent.count(b"\x81") == 10_000


def test_a_queue_is_counted_in_frames_and_drains(loop):
    connection, transport = client()
    frame = len(thrum.encode_frame(thrum.TEXT, b"x" * 100))
    for _ in range(thrum.QUEUE_MAX):
        connection.push(b"x" * 100)
    assert connection.outbox.room() == 0 and not connection.silent
    transport.read(10 * frame + 1)
    assert connection.outbox.room() == 10       # the eleventh has not left whole
    transport.read(1 << 20)
    assert connection.outbox.room() == thrum.QUEUE_MAX


@pytest.mark.parametrize("kind, goodbye", [(thrum.WebConnection, thrum.encode_frame(thrum.CLOSE, b"\x03\xf5")), (thrum.Connection, b"")])
def test_who_is_behind_is_closed_with_what_was_on_its_way(loop, kind, goodbye):
    """1013, try again later; it gets what is queued, in order, and nothing after it."""
    connection, transport = client(kind)
    for n in range(thrum.QUEUE_MAX + 50):
        connection.push(b"%03d" % n)
    assert connection.silent
    waiting = transport.waiting
    assert waiting == b"".join(connection.framed(b"%03d" % n) for n in range(thrum.QUEUE_MAX)) + goodbye
    connection.push(b"more")
    assert transport.waiting == waiting


def test_bytes_count_too(loop):
    connection, transport = client()
    while not connection.silent:
        connection.push(b"x" * 200_000)
    assert thrum.QUEUE_BYTES <= len(transport.waiting) < thrum.QUEUE_BYTES + 300_000


def test_a_batch_of_many_is_not_too_much_for_who_has_everything(loop):
    """256 requests may be one batch, and each may be told twice."""
    connection, transport = client()
    connection.push(*[b"x"] * (2 * thrum.QUEUE_MAX))
    assert not connection.silent and transport.waiting == connection.framed(b"x") * 2 * thrum.QUEUE_MAX
    connection.push(b"x")
    assert connection.silent


def test_an_answer_does_not_make_anybody_slow(loop):
    """It was asked for; what is told meanwhile waits behind it."""
    connection, transport = client()
    answering = connection.answer(b"x" * 2 * thrum.QUEUE_BYTES)     # it waits in drain()
    answering.send(None)
    connection.push(b"told")
    assert not connection.silent and transport.waiting.endswith(connection.framed(b"told"))
    with pytest.raises(StopIteration):
        transport.read(len(transport.waiting))
        answering.send(None)
    while not connection.silent:
        connection.push(b"x" * 200_000)
    assert len(transport.waiting) < thrum.QUEUE_BYTES + 300_000


def test_a_stalled_write_ends_after_ten_seconds_and_a_slow_one_does_not(loop):
    connection, transport = client(thrum.Connection)
    connection.push(b"x" * 1000)
    for _ in range(20):
        loop.pass_s(thrum.WRITE_S - 1)
        transport.read(10)
    assert not transport.aborted
    loop.pass_s(2 * thrum.WRITE_S)
    assert transport.aborted


def test_a_closed_connection_that_never_reads_is_given_up(loop):
    """Its descriptor must come back, though the last bytes never leave."""
    connection, transport = client(thrum.Connection)
    connection.push(b"x")
    connection.close(1001)
    connection.ended()
    loop.pass_s(thrum.WRITE_S)
    assert transport.aborted


def test_a_silent_client_is_pinged_and_given_up(loop):
    connection, transport = client(takes=1 << 20)
    loop.pass_s(thrum.PING_S - 0.1)
    assert transport.sent == b""
    loop.pass_s(0.2)
    assert transport.sent == thrum.encode_frame(thrum.PING, b"")
    loop.pass_s(thrum.DEAD_S - thrum.PING_S - 0.2)
    assert not transport.aborted
    loop.pass_s(1)
    assert transport.aborted


@pytest.mark.parametrize("frame", [thrum.encode_frame(thrum.PONG, b"", mask=b"abcd"), thrum.encode_frame(thrum.TEXT, b"{}", mask=b"abcd")])
def test_any_frame_is_a_sign_of_life(loop, frame):
    connection, transport = client(takes=1 << 20)
    for _ in range(10):
        loop.pass_s(thrum.DEAD_S - 1)
        connection.feed(frame)
    assert not transport.aborted and transport.sent.count(thrum.encode_frame(thrum.PING, b"")) == 10
    loop.pass_s(thrum.DEAD_S + 1)
    assert transport.aborted


def test_half_a_frame_is_none(loop):
    """Who dribbles bytes of one frame for ever does not hold a place."""
    connection, transport = client(takes=1 << 20)
    frame = thrum.encode_frame(thrum.TEXT, b"x" * 500, mask=b"abcd")
    for n in range(7):
        connection.feed(frame[n:n + 1])
        loop.pass_s(10)
    assert transport.aborted


def test_a_close_without_an_answer_ends(loop):
    connection, transport = client(takes=1 << 20)
    connection.close(1001)
    assert transport.sent == thrum.encode_frame(thrum.CLOSE, b"\x03\xe9") and not transport.aborted
    connection.close(1011)              # once is enough
    loop.pass_s(thrum.CLOSE_S)
    assert transport.aborted and transport.sent.count(b"\x88") == 1


def test_many_notes_go_out_with_few_writes_and_in_order(loop):
    audience, pages = thrum.Audience(), [client(takes=1 << 20) for _ in range(3)]
    writes = []
    for number, (page, transport) in enumerate(pages):
        audience.bind(page, f"agent{number}")
        audience.bind(page, "everyone")
        transport.write = lambda data, number=number, write=transport.write: (writes.append(number), write(data))
    notes = [(b"%d " % n, [(f"agent{n % 2}", b"own"), ("everyone", b"all")]) for n in range(40)]
    audience.tell(notes)
    for number, (page, transport) in enumerate(pages):
        assert transport.sent == b"".join(page.framed(b"%d %s" % (n, b"own" if n % 2 == number else b"all")) for n in range(40))
    assert len(writes) == 3 * -(-40 // thrum.TOLD_TOGETHER)


def test_several_frames_count_as_several(loop):
    connection, transport = client()
    connection.push(*[b"x"] * (thrum.QUEUE_MAX - 1))
    assert connection.outbox.room() == 1 and not connection.silent
    waiting = transport.waiting
    connection.push(b"y", b"z")         # what it does not get it finds in the journal
    assert connection.silent and transport.waiting == waiting + connection.framed(b"y") + thrum.encode_frame(thrum.CLOSE, b"\x03\xf5")


def test_an_audience_is_told_once_and_forgets(loop):
    audience = thrum.Audience()
    one, transport = client(takes=1 << 20)
    for agent_id in ("ada", "bob"):
        audience.bind(one, agent_id)
    audience.tell([(b"a", [("ada", b"1"), ("bob", b"2"), ("cyd", b"3")])])
    assert transport.sent == one.framed(b"a1")
    for n in range(200):
        audience.bind(one, f"agent{n}")
    assert len(one.agents) == thrum.AGENTS_MAX == len(audience.connections)
    audience.leave(one)
    assert audience.connections == {} == one.agents
