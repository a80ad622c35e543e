"""Measures thrum against its speed budgets, each beside a floor that does the same work with nothing around it.

    python3 tests/bench.py [--quick] [--large] [--only WORD] [--file THRUM.PY]

Figure and floor are taken in turns in one run, so that noise hits both; what is printed are medians.  A budget is a
ratio to the floor, so it holds on any machine.  `--large` adds the rows for 1,000,000 messages (some minutes and 3 GB),
`--quick` takes fewer rounds.  `--only` names a group: command, surface, parallel, send, clients, live, broadcast, crowd, inbox,
outbox, search, work, start, rebuild, memory.  The exit status is 1 when a budget is missed.

What a notification takes (`live`) is seen by its sender and its subscribers, which are one process, neither the daemon nor
this one: from just before the request is handed to the kernel until a subscriber has got the frame from it.  So it holds the
whole durable send, and so does the floor: an asyncio server that appends and syncs the same line, then writes the same
bytes to as many sockets.  Its p99 is over all reads of a fifth of the rounds, and the median of the five fifths is printed.
"""

import argparse
import asyncio
import collections
import importlib
import json
import os
import random
import resource
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = os.path.realpath(sys.executable)       # never a shim: pyenv's costs 77 ms
EMPTY = [PYTHON, "-IS", "-c", "pass"]
IMPORTS = "import asyncio, sqlite3"
NEEDED = [PYTHON, "-c", IMPORTS]
CLEAN = {name: value for name, value in os.environ.items()
         if not name.startswith(("THRUM_", "GIT_", "PYTHON")) and name not in ("COLUMNS", "NO_COLOR")}
AGENTS = 50                     # in a store with many messages
CONNECTIONS = 64                # clients at once
EPOCH = "be7c4be7c4be7c40"
DAEMON_ID = "d_bench0000000"
FILE_BYTES = 8 << 20            # of one journal file
SURFACE = (
    "inbox --all", "inbox --from agent2", "inbox --scope module:core", "sent", "sent --unread", "sent --to @agent2", "search parser",
    "trace MSG", "message get MSG", "message read --all", "reply MSG yes", "wait --after-seq 0 --timeout 1s", "status", "overview",
    "prime", "whoami", "ping agent2", "agent list", "agent list --context", "agent context", "session list", "team", "claims",
    "group list", "group info everyone", "group members everyone --expand", "purge --before 1d", "agent cleanup --dry-run", "context show",
    "config show", "version", "help")
WORKTREES, FILES = 10, 5_000    # of the rows about work
SEARCHES = {"rare": "Message 4711", "common": "parser", "three words": "parser module pass"}
thrum = None                    # the module that is measured; see `load`


def load(folder):
    """Import the copy of thrum.py in a folder."""
    global thrum
    sys.path.insert(0, folder)
    thrum = importlib.import_module("thrum")


def clock(function, *args, **more):
    """The seconds that a call takes."""
    start = time.perf_counter()
    function(*args, **more)
    return time.perf_counter() - start


def spawn(argv, env):
    """Start a process that says nothing and reads nothing."""
    null = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (0, 1, 2)]
    return os.posix_spawn(argv[0], argv, env, file_actions=null)


def expect_success(argv, env, status):
    if status:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        raise SystemExit(f"{argv} failed ({status}):\n{done.stdout}{done.stderr}")


def run(argv, env=None):
    """Run a process to its end."""
    env = env or CLEAN
    expect_success(argv, env, os.waitpid(spawn(argv, env), 0)[1])


def run_many(commands, at_once):
    """Run processes, so many at a time: seconds from the first to the last."""
    start, running = time.perf_counter(), {}
    for argv in commands:
        if len(running) == at_once:
            pid, status = os.waitpid(-1, 0)
            expect_success(running.pop(pid), CLEAN, status)
        running[spawn(argv, CLEAN)] = argv
    while running:
        pid, status = os.waitpid(-1, 0)
        expect_success(running.pop(pid), CLEAN, status)
    return time.perf_counter() - start


# ---- stores

def stamp(ns):
    """A time as the log spells it: the last of nine digits is never 0."""
    return thrum.stamp_of(ns | 1 if (ns | 1) % 10 else ns + 1)


def history(messages, agents=AGENTS, seed=7):
    """Events of a team: registrations, direct, group and broadcast mail, some of it answered and read.

    Of the messages 80 % go to one agent, 15 % to a group of five and 5 % to all; a quarter is read by somebody, a fifth
    are answers, a third carries a scope and a reference.
    """
    rng = random.Random(seed)
    start = time.time_ns() - (messages * 2 + agents * 2 + 1_000) * 1_000_000
    count = 0

    def event(kind, /, **fields):
        nonlocal count
        count += 1
        ns = start + count * 1_000_000
        fields.update(type=kind, timestamp=stamp(ns), event_id=ident("evt", ns), v=1, origin_daemon=DAEMON_ID, sequence=count)
        return fields

    def ident(kind, ns):
        return kind + "_" + thrum.crockford(ns // 1_000_000 << 80 | rng.getrandbits(80), 26)

    names = [f"agent{n}" for n in range(agents)]
    sessions = {name: ident("ses", start) for name in names}
    yield event("group.create", group_id="grp_everyone", name="everyone", description="All agents", created_by="system")
    yield event("group.member.add", group_id="grp_everyone", member_type="role", member_value="*", added_by="system")
    for n, name in enumerate(names):
        yield event("agent.register", agent_id=name, kind="agent", name=name, role="coder", module=f"module{n}",
                    hostname="bench", worktree="bench")
        yield event("agent.session.start", session_id=sessions[name], agent_id=name)
    groups = {f"team{n}": names[5 * n:5 * n + 5] for n in range(min(10, agents // 5))}
    for group, members in groups.items():
        yield event("group.create", group_id="grp_" + group, name=group, created_by="agent0")
        for name in members:
            yield event("group.member.add", group_id="grp_" + group, member_type="agent", member_value=name, added_by="agent0")
    recent = collections.deque(maxlen=200)
    for number in range(messages):
        author, chance = rng.choice(names), rng.random()
        scopes, refs, more = [], [], {}
        if chance < 0.8:
            recipients = [rng.choice(names)]
            refs.append({"type": "mention", "value": recipients[0]})
        elif chance < 0.95:
            group = rng.choice(sorted(groups))
            recipients = sorted(groups[group])
            scopes.append({"type": "group", "value": group})
            refs.append({"type": "group", "value": group})
        else:
            recipients = sorted(names)
        recipients = [name for name in recipients if name != author]
        if rng.random() < 0.33:
            scopes.append({"type": "module", "value": f"module{rng.randrange(agents)}"})
            refs.append({"type": "issue", "value": f"bench-{rng.randrange(1_000)}"})
        if recent and rng.random() < 0.2:
            parent, thread = rng.choice(recent)
            refs.append({"type": "reply_to", "value": parent})
            more["thread_id"] = thread
        if scopes:
            more["scopes"] = scopes
        if refs:
            more["refs"] = refs
        message_id = ident("msg", start + count * 1_000_000)
        yield event("message.create", message_id=message_id, agent_id=author, session_id=sessions[author], recipients=recipients,
                    body={"format": "markdown", "content": f"Message {number}: the parser of module {number % 97} accepts an "
                          f"empty list now; {rng.randrange(1_000)} tests pass, please have a look at the two that do not."}, **more)
        recent.append((message_id, more.get("thread_id") or "thr_" + message_id[4:]))
        if recipients and rng.random() < 0.25:
            yield event("message.receipt", message_id=message_id, agent_id=recipients[0], receipt_type="read")


def write_journal(directory, events):
    """Write events as a journal, in files of the usual size."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    file, size = None, 0
    for number, event in enumerate(events, 1):
        if file is None or size > FILE_BYTES:
            if file:
                file.close()
            file = open(f"{directory}/{number}.jsonl", "wb")
            size = file.write(thrum.canonical({"epoch": EPOCH, "first": number, "v": 1}) + b"\n")
        size += file.write(thrum.canonical(event) + b"\n")
    file.close()


class Repo:
    """A scratch repository with thrum in it."""

    def __init__(self, path):
        self.path = path
        os.makedirs(path)
        for command in (["init", "-q"], ["-c", "user.name=b", "-c", "user.email=b@localhost", "commit", "-q", "--allow-empty", "-m", "1"]):
            subprocess.run(["git", *command], cwd=path, env=CLEAN, check=True)
        self.places = thrum.initialize(path)[0]
        self.launcher = path + "/.thrum/bin/thrum"

    def fill(self, messages, agents=AGENTS):
        """Give it that many messages.  In a process of its own: a daemon must start within 10 s."""
        write_journal(self.places.journal, history(messages, agents))
        with open(self.places.var + "/daemon.json", "wb") as file:
            file.write(thrum.canonical({"daemon_id": DAEMON_ID}) + b"\n")
        helper("open", self.path)
        return self

    def start(self):
        thrum.start_daemon(self.places)

    def stop(self):
        thrum.stop_daemon(self.places)

    def kill(self):
        """kill -9, and wait until the kernel has let go of the lock."""
        os.kill(thrum.read_pid(self.places), signal.SIGKILL)
        os.close(thrum.take_lock(self.places.var + "/thrum.lock", 10))

    def client(self):
        return thrum.connect(self.path)

    def join(self, client, *names):
        """Register agents, each with a session."""
        for name in names:
            client.call("agent.register", name=name, role="coder", module="module-" + name)
            client.call("session.start", agent_id=name)


def drop_database(places):
    for name in ("messages.db", "messages.db-wal", "messages.db-shm", "clean.json"):
        if os.path.exists(f"{places.var}/{name}"):
            os.unlink(f"{places.var}/{name}")


def rss(pid):
    """The resident memory of a process in MB."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024
    except FileNotFoundError:
        return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True).stdout) / 1024


# ---- helpers: each runs in a process of its own, `bench.py --helper NAME FOLDER ARGUMENTS`, and prints JSON

def helper_argv(name, *args):
    return [PYTHON, os.path.abspath(__file__), "--helper", name, os.path.dirname(thrum.__file__), *map(str, args)]


def helper(name, *args):
    """What a helper prints."""
    done = subprocess.run(helper_argv(name, *args), env=CLEAN, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"helper {name} failed:\n{done.stderr}")
    return json.loads(done.stdout or "null")


def open_store(path):
    """Open a ledger as the daemon does, and close it: events projected, seconds for them, seconds for everything."""
    places, spent = thrum.find_places(path), []

    class Timed(thrum.Ledger):
        def _project_from(self, after):
            start = time.perf_counter()
            count = super()._project_from(after)
            spent.append(time.perf_counter() - start)
            return count

    ledger = Timed(places, thrum.World())
    all_of_it = clock(ledger.open)
    projected = ledger.rebuilt
    ledger.close()
    return {"events": projected, "seconds": spent[0], "open": all_of_it}


WITH_SEQ = ("events", "messages", "message_scopes", "message_refs", "message_edits", "deliveries")


def rows_by_seq(path):
    """The rows of a database: {table: (number of columns, {sequence: rows})}; tables without a sequence under 0."""
    db = sqlite3.connect(path)
    tables = [row[0] for row in db.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite%'")]
    found = {}
    for table in tables:
        cursor = db.execute(f"select * from {table}")
        names = [column[0] for column in cursor.description]
        by_seq = collections.defaultdict(list)
        if table not in ("schema_version", "meta"):
            at = names.index("seq") if table in WITH_SEQ else None
            for row in cursor:
                by_seq[0 if at is None else row[at]].append(row)
        found[table] = len(names), by_seq
    db.close()
    return found


def insert(db, tables, batches):
    """Insert {table: rows}; a table may come with a row of its own."""
    for table, rows in batches.items():
        way = "insert" if table in WITH_SEQ else "insert or replace"
        db.executemany(f"{way} into {table} values({', '.join('?' * tables[table][0])})", rows)


def rebuild_floor(path, folder):
    """json.loads of each line and the same rows into the same schema in the same transactions: events and seconds."""
    places = thrum.find_places(path)
    tables = rows_by_seq(places.database)
    files = sorted((int(name[:-6]), name) for name in os.listdir(places.journal))
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    store = thrum.Store(folder + "/floor.db", thrum.World(), writable=True)
    store.create()
    store.careless(True)
    db, count, batch = store.db, 0, []

    def flush():
        nonlocal batch
        db.execute("begin immediate")
        wanted = [0, *batch] if count == len(batch) else batch
        insert(db, tables, {table: [row for seq in wanted for row in by_seq.get(seq, ())] for table, (_, by_seq) in tables.items()})
        db.execute("insert or replace into meta values('seq', ?)", (batch[-1],))
        db.execute("commit")
        batch = []

    start = time.perf_counter()
    for first, name in files:
        with open(f"{places.journal}/{name}", "rb") as file:
            next(file)
            for seq, line in enumerate(file, first):
                json.loads(line)
                count += 1
                batch.append(seq)
                if len(batch) == thrum.STORE_BATCH:
                    flush()
    if batch:
        flush()
    seconds = time.perf_counter() - start
    db.close()
    return {"events": count, "seconds": seconds}


def senders(folder, path, prefix, clients, each):
    """Clients that send one message after the other over a Unix socket: messages and seconds."""
    os.chdir(folder)            # no path of a socket is too long
    clients, each = int(clients), int(each)
    selector = selectors.DefaultSelector()
    for n in range(clients):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message.send", "params": {
            "caller_agent_id": f"{prefix}{n}", "mentions": [f"@{prefix}{(n + 1) % clients}"],
            "content": f"client {n} reports: the parser accepts an empty list now and all of the tests pass"}}).encode() + b"\n"
        selector.register(sock, selectors.EVENT_READ, [line, each, b""])
    start = time.perf_counter()
    for key in list(selector.get_map().values()):
        key.fileobj.sendall(key.data[0])
    left = clients
    while left:
        for key, _ in selector.select():
            data = key.data
            data[2] += key.fileobj.recv(65536)
            if not data[2].endswith(b"\n"):
                continue
            if b'"result"' not in data[2]:
                raise SystemExit(data[2].decode() or "the server closed the connection")
            data[1], data[2] = data[1] - 1, b""
            if data[1]:
                key.fileobj.sendall(data[0])
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1
    return {"messages": clients * each, "seconds": time.perf_counter() - start}


def bare_server(folder, prefix, clients):
    """The floor of many clients: decodes, appends, syncs and inserts the same rows, several at a time; nothing else."""
    os.chdir(folder)
    store = thrum.Store("bare.db", thrum.World(), writable=True)
    store.create()
    db = store.db
    journal = os.open("bare.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    keys = {f"{prefix}{n}": n + 1 for n in range(int(clients))}
    waiting = []
    seq = 0

    def commit():
        nonlocal seq
        batch, lines, events, messages, refs, deliveries = waiting[:], [], [], [], [], []
        waiting.clear()
        for _, data in batch:
            seq += 1
            params = json.loads(data)["params"]
            author, to = params["caller_agent_id"], params["mentions"][0][1:]
            ns, message_id, event_id = time.time_ns(), f"msg_{seq:026d}", f"evt_{seq:026d}"
            ref = [{"type": "mention", "value": to}]
            session = "ses_01KBENCH0000000000000000000"
            lines.append(json.dumps({
                "agent_id": author, "body": {"content": params["content"], "format": "markdown"}, "event_id": event_id,
                "message_id": message_id, "origin_daemon": DAEMON_ID, "recipients": [to], "refs": ref, "sequence": seq,
                "session_id": session, "timestamp": thrum.stamp_of(ns), "type": "message.create", "v": 1}, separators=(",", ":")))
            events.append((event_id, seq))
            messages.append((seq, message_id, ns, keys[author], session, "markdown", params["content"], str(ref), str(keys[to]),
                             str(keys[to]), 0, 1, DAEMON_ID))
            refs.append(("mention", to, ns, seq))
            deliveries.append((keys[to], ns, seq))
        db.execute("begin immediate")
        db.executemany("insert into events values(?, ?)", events)
        db.executemany("insert into messages(seq, message_id, at, author, session_id, format, content, refs, listed, delivered, wide, "
                       "unread_by, daemon) values(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", messages)
        db.executemany("insert into message_refs values(?, ?, ?, ?)", refs)
        db.executemany("insert into deliveries(agent, at, seq) values(?, ?, ?)", deliveries)
        os.write(journal, ("\n".join(lines) + "\n").encode())
        thrum.durable_sync(journal)
        db.execute("commit")
        for (done, _), row in zip(batch, messages):
            done.set_result(b'{"jsonrpc":"2.0","result":{"message_id":"%s","created_at":"%s","seq":%d},"id":1}\n'
                            % (row[1].encode(), thrum.stamp_of(row[2]).encode(), row[0]))

    async def client(reader, writer):
        while True:
            data = await reader.readline()
            if not data:
                return writer.close()
            if not waiting:
                asyncio.get_running_loop().call_soon(commit)
            done = asyncio.get_running_loop().create_future()
            waiting.append((done, data))
            writer.write(await done)

    async def serve():
        server = await asyncio.start_unix_server(client, "bare.sock")
        print("ready", flush=True)
        await server.serve_forever()

    asyncio.run(serve())


ALL = {"all": True}             # a subscription


class Crowd:
    """Subscribers of one server, all in this process, and a client that sends to it."""

    def __init__(self):
        self.selector = selectors.DefaultSelector()
        self.frame = self.text = b""        # as the last of the subscribers got it, and what was sent

    def open(self, port, hello=b"", sign=b"", limit=0):
        """A socket that has said hello and waits for a sign; with a receive buffer of `limit` bytes it is soon behind."""
        sock = socket.socket()
        if limit:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, limit)
        sock.connect(("127.0.0.1", port))
        sock.sendall(hello)
        return sock, sign

    def settle(self, opened):
        """Wait for the signs; the sockets."""
        for sock, sign in opened:
            answer = b""
            while sign not in answer:
                data = sock.recv(65536)
                if not data:
                    raise SystemExit(f"hung up, without {sign}: {answer}")
                answer += data
        return [sock for sock, _ in opened]

    def listen(self, opened):
        for sock in self.settle(opened):
            self.selector.register(sock, selectors.EVENT_READ)

    def read(self, wait_s):
        """What the subscribers get next, each with the time: (data, ns).  They answer pings, or they would be given up."""
        for key, _ in self.selector.select(wait_s):
            data = key.fileobj.recv(65536)
            yield data, time.monotonic_ns()
            if not data or data[:1] == b"\x88":
                raise SystemExit("a subscriber was closed")
            if b"\x89\0" in data:           # in no other frame of a server: its texts are ASCII, and so short
                key.fileobj.sendall(thrum.encode_frame(thrum.PONG, b"", mask=b"mask"))

    def round(self, text):
        """Send a text: the ns until each of the subscribers has it."""
        spent, count = [], len(self.selector.get_map())
        begin = time.monotonic_ns()
        self.send(text)
        while len(spent) < count:
            before = len(spent)
            for data, now in self.read(10):
                if text in data:
                    spent.append(now - begin)
                    self.frame = data
            if len(spent) == before and time.monotonic_ns() - begin > 20e9:
                raise SystemExit(f"{count - before} subscribers were not told")
        self.text = text
        if b"error" in self.sender.recv(65536):
            raise SystemExit("a message was refused")
        return spent


class ThrumCrowd(Crowd):
    """People, each with a session, a WebSocket and (unless `wanted` is None) a subscription; an agent sends over the Unix socket."""

    def __init__(self, path, count, pad=0, wanted=ALL):
        super().__init__()
        self.places = thrum.find_places(path)
        with open(self.places.var + "/ws.port") as file:
            self.port = int(file.read())
        self.scopes = [{"type": "pad", "value": f"{n:0250d}"} for n in range(pad)]      # makes a notification longer
        self.wanted = wanted
        for first in range(0, count, 100):
            self.listen([self.join(n) for n in range(first, min(first + 100, count))])
        self.sender = thrum.dial(self.places.var)

    def join(self, number, limit=0):
        calls = [("user.register", {"username": f"page{number}"}), ("session.start", {"agent_id": f"user:page{number}"})]
        calls += [("subscribe", self.wanted)] * (self.wanted is not None)
        batch = json.dumps([{"jsonrpc": "2.0", "id": 1, "method": method, "params": params} for method, params in calls]).encode()
        return self.open(self.port, thrum.request_upgrade(f"localhost:{self.port}", "/ws", "A" * 22 + "==")
                         + thrum.encode_frame(thrum.TEXT, batch, mask=b"mask"), b'"session_id"', limit)

    def send(self, text):
        self.sender.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "message.send", "params": {
            "caller_agent_id": "sender", "mentions": ["@receiver"], "content": text.decode(), "scopes": self.scopes}}).encode() + b"\n")

    def line(self):
        """The last line of the journal."""
        newest = max(os.listdir(self.places.journal), key=lambda name: int(name[:-6]))
        with open(f"{self.places.journal}/{newest}", "rb") as file:
            return file.readlines()[-1]

    def memory(self):
        return rss(thrum.read_pid(self.places))


class EchoCrowd(Crowd):
    """Subscribers of `echo_server`, who get what those of a model get."""

    def __init__(self, port, count, model):
        super().__init__()
        self.listen([self.open(port, b"listen\n", b"listen\n") for _ in range(count)])
        self.sender, self.model, self.line = self.open(port)[0], model, model.line()

    def send(self, text):
        frame = self.model.frame.replace(self.model.text, text)
        self.sender.sendall(b"%d %d\n" % (len(self.line), len(frame)) + self.line + frame)


def echo_server(folder):
    """The floor of notifications: appends and syncs a line, then writes a frame to all who listen, then answers."""
    journal = os.open(folder + "/echo.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    listening = set()

    async def client(reader, writer):
        while True:
            data = await reader.readline()
            if not data:
                listening.discard(writer)
                return writer.close()
            if data == b"listen\n":
                listening.add(writer)
            else:
                line, frame = [await reader.readexactly(int(size)) for size in data.split()]
                os.write(journal, line)
                thrum.durable_sync(journal)
                for one in listening:
                    one.write(frame)
            writer.write(data)

    async def serve():
        server = await asyncio.start_server(client, "127.0.0.1", 0, backlog=2_000)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    many_files()
    asyncio.run(serve())


def many_files():
    """Let this process have as many sockets as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (10_000 if hard == resource.RLIM_INFINITY else min(hard, 10_000), hard))


def of_fifths(rounds, share):
    """The ms below which such a share of the numbers lies, of each fifth of some lists of ns: the median."""
    found = []
    for n in range(5):
        values = sorted(ns for spent in rounds[n * len(rounds) // 5:(n + 1) * len(rounds) // 5] for ns in spent)
        found.append(values[int(share * (len(values) - 1))] / 1e6)
    return statistics.median(found)


def told(path, port, count, rounds):
    """How long it takes to tell so many subscribers of a daemon, and of an echo server: p50 and p99 in ms of each."""
    many_files()
    crowds = [ThrumCrowd(path, int(count))]
    crowds[0].round(b"round 000000")
    crowds.append(EchoCrowd(int(port), int(count), crowds[0]))
    spent = [[], []]
    for number in range(1, int(rounds) + 6):
        for crowd, found in zip(crowds, spent):
            found.append(crowd.round(b"round %06d" % number))
    return [[of_fifths(found[5:], share) for share in (0.5, 0.99)] for found in spent]


def stopped(path, other, count, rounds):
    """The same for two daemons, where the second has one more subscriber who does not read.

    p99 in ms of both, the MB by which each grew at the most, and whether the one who does not read was given up.
    """
    many_files()
    crowds = [ThrumCrowd(where, int(count), pad=12) for where in (path, other)]
    (sock,) = crowds[1].settle([crowds[1].join(int(count), 4096)])
    before, most, spent = [crowd.memory() for crowd in crowds], [0, 0], [[], []]
    for number in range(1, int(rounds) + 6):
        for n, crowd in enumerate(crowds):
            spent[n].append(crowd.round(b"round %06d" % number))
            most[n] = max(most[n], crowd.memory() - before[n]) if number % 10 == 0 else most[n]
    closed = True
    sock.settimeout(5)
    try:
        while sock.recv(1 << 20):
            pass
    except ConnectionError:
        pass
    except socket.timeout:
        closed = False
    return {"p99": [of_fifths(found[5:], 0.99) for found in spent], "grown": most, "closed": closed}


def hold(path, count, wanted):
    """Be so many subscribers for as long as the parent lives."""
    many_files()
    crowd = ThrumCrowd(path, int(count), wanted=json.loads(wanted))
    print("ready", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        collections.deque(crowd.read(5), maxlen=0)


HELPERS = {"open": open_store, "floor": rebuild_floor, "senders": senders, "bare": bare_server, "echo": echo_server, "told": told,
           "stopped": stopped, "hold": hold}


# ---- the table

TIMES, SHARE, TIMES_PLUS, PLUS = "times", "share", "times plus", "plus"


class Bench:
    """One run: the stores that it has made and the rows that it has measured."""

    def __init__(self, scratch, quick, large):
        self.scratch, self.quick, self.large = scratch, quick, large
        self.repos = {}
        self.missed = 0

    def rounds(self, count):
        return max(3, count // 4) if self.quick else count

    def repo(self, name):
        """The repository of that name: `empty`, or a number of messages."""
        if name not in self.repos:
            self.repos[name] = Repo(f"{self.scratch}/{name}")
            if isinstance(name, int):
                self.repos[name].fill(name)
        return self.repos[name]

    def sizes(self):
        return [10_000, 100_000, 1_000_000] if self.large else [10_000, 100_000]

    def in_turns(self, rounds, *functions, warm_up=1):
        """The median of the seconds of each function, called in turns."""
        spent = [[] for _ in functions]
        for number in range(rounds + warm_up):
            for index, function in enumerate(functions):
                seconds = clock(function)
                if number >= warm_up:
                    spent[index].append(seconds)
        return [statistics.median(values) for values in spent]

    def row(self, what, measured, floor, unit="ms", kind=None, limit=0.0, extra=0.0):
        """Print one row.  `kind` says what the budget is; without one the row is for information."""
        met = {None: True, TIMES: measured <= limit * floor, SHARE: measured >= limit * floor,
               TIMES_PLUS: measured <= limit * floor + extra, PLUS: measured - floor <= limit}[kind]
        budget = {None: "–", TIMES: f"≤ {limit:g}×", SHARE: f"≥ {limit:.0%}", TIMES_PLUS: f"≤ {limit:g}× + {extra:g} {unit}",
                  PLUS: f"≤ +{limit:g} {unit}"}[kind]
        ratio = "–" if not floor else f"{measured / floor:.0%}" if kind == SHARE else f"{measured - floor:+.3g} {unit}" if kind == PLUS \
            else f"{measured / floor:.2f}×"
        verdict = "" if kind is None else "yes" if met else "NO"
        self.missed += not met
        print(f"{what:<64} | {number(measured, unit):>13} | {number(floor, unit) if floor else '–':>13} | {ratio:>8} | {budget:<13} | "
              f"{verdict}", flush=True)

    # ---- groups of rows

    def command(self):
        """One command at a time: by the launcher, as a module, as a script."""
        repo = self.repo("empty")
        repo.start()
        os.chdir(repo.path)
        run([repo.launcher, "quickstart", "--name", "ada", "--role", "planner", "--module", "core"])
        with repo.client() as client:
            repo.join(client, "bob")
        inbox = ["inbox", "--unread"]
        folder = os.path.dirname(thrum.__file__)
        compiled = [PYTHON, "-IS", "-c", "compile(open(%r, encoding='utf-8').read(), '', 'exec')" % thrum.__file__]
        module = {**CLEAN, "PYTHONPATH": folder}
        with open(folder + "/nothing.py", "w"):
            pass
        empty, launcher, as_module, nothing, send, floor, script, bare_script = self.in_turns(
            self.rounds(60), lambda: run(EMPTY), lambda: run([repo.launcher, *inbox]),
            lambda: run([PYTHON, "-m", "thrum", *inbox], module), lambda: run([PYTHON, "-m", "nothing"], module),
            lambda: run([repo.launcher, "send", "the tests pass", "--to", "@bob"]),
            lambda: run(compiled), lambda: run([PYTHON, thrum.__file__, *inbox]), lambda: run([PYTHON, "-IS", thrum.__file__, *inbox]),
            warm_up=3)
        self.row("inbox --unread, empty, by the launcher / empty Python", launcher * 1e3, empty * 1e3, "ms", TIMES, 2)
        self.row("the same by python3 -m thrum", as_module * 1e3, empty * 1e3, "ms", TIMES, 3.5)
        self.row("… / an empty module by -m (imports what site-packages ask for)", as_module * 1e3, nothing * 1e3)
        self.row("the same as a script / compile()", script * 1e3, floor * 1e3, "ms", TIMES, 1.3)
        self.row("… with -IS, as the floor is", bare_script * 1e3, floor * 1e3)
        self.row("send by the launcher / empty Python", send * 1e3, empty * 1e3, "ms", TIMES, 2)

    def surface(self):
        """Every other command, by the launcher, on a store of 100,000 messages."""
        repo = self.repo(10_000 if self.quick else 100_000)
        repo.start()
        os.chdir(repo.path)
        run([repo.launcher, "quickstart", "--name", "agent1", "--role", "coder", "--module", "module1", "--force"])
        with repo.client() as client:
            sent = client.call("message.outbox", caller_agent_id="agent1", page_size=1)["messages"][0]["message_id"]
        commands = [line.replace("MSG", sent).split() for line in SURFACE]
        for command in commands:
            run([repo.launcher, *command])
        spent = self.in_turns(self.rounds(12), lambda: run(EMPTY),
                              *(lambda command=command: run([repo.launcher, *command]) for command in commands), warm_up=1)
        for command, seconds in zip(SURFACE, spent[1:]):
            self.row(f"{command} / empty Python", seconds * 1e3, spent[0] * 1e3, "ms", TIMES, 3)
        repo.stop()

    def parallel(self):
        """Eight senders at once, each send a process."""
        repo = self.repo("empty")
        repo.start()
        os.chdir(repo.path)
        run([repo.launcher, "quickstart", "--name", "ada", "--role", "planner", "--module", "core"])
        reader = f"reader{time.time_ns()}"
        with repo.client() as client:
            repo.join(client, reader)
        count, sends, rates, floors = 80, 0, [], []
        for _ in range(self.rounds(8)):
            floors.append(count / run_many([EMPTY] * count, 8))
            texts = [f"report {n}" for n in range(sends, sends + count)]
            rates.append(count / run_many([[repo.launcher, "send", text, "--to", "@" + reader] for text in texts], 8))
            sends += count
        with repo.client() as client:
            read, page = set(), 0
            while page * 100 < sends:
                page += 1
                found = client.call("message.list", for_agent=reader, page_size=100, page=page)["messages"]
                read.update(message["body"]["content"] for message in found)
        self.row("8 senders at once by the launcher / empty Pythons", statistics.median(rates), statistics.median(floors), "/s", SHARE, 0.6)
        self.row("… of them read back", float(len(read)), float(sends), "", SHARE, 1)

    def send(self):
        """Durable sends of one client, one after the other."""
        repo = self.repo("empty")
        repo.start()
        descriptor = os.open(self.scratch + "/floor.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with repo.client() as client:
            repo.join(client, "sender", "receiver")
            text = "the parser accepts an empty list now and all of the tests pass"

            def durable():
                client.call("message.send", caller_agent_id="sender", mentions=["@receiver"], content=text)

            durable()
            newest = max((name for name in os.listdir(repo.places.journal)), key=lambda name: int(name[:-6]))
            with open(f"{repo.places.journal}/{newest}", "rb") as file:
                line = file.readlines()[-1]

            def floor():
                os.write(descriptor, line)
                thrum.durable_sync(descriptor)

            floored, measured = self.in_turns(self.rounds(1_000), floor, durable, warm_up=20)
        os.close(descriptor)
        self.row("durable send, one client / append + sync", measured * 1e3, floored * 1e3, "ms", TIMES_PLUS, 1.5, 0.5)

    def clients(self):
        """Durable sends of 64 clients of 64 agents."""
        repo = self.repo("empty")
        repo.start()
        prefix = f"c{time.time_ns()}x"
        with repo.client() as client:
            repo.join(client, *(f"{prefix}{n}" for n in range(CONNECTIONS)))
        folder = self.scratch + "/bare"
        os.makedirs(folder)
        bare = subprocess.Popen(helper_argv("bare", folder, prefix, CONNECTIONS), env=CLEAN, stdout=subprocess.PIPE)
        try:
            bare.stdout.readline()
            rates, floors = [], []
            for number in range(self.rounds(8) + 1):
                for found, where, path in ((floors, folder, "bare.sock"), (rates, repo.places.var, "thrum.sock")):
                    done = helper("senders", where, path, prefix, CONNECTIONS, 20 if self.quick else 40)
                    if number:
                        found.append(done["messages"] / done["seconds"])
        finally:
            bare.kill()
            bare.wait()
            bare.stdout.close()
            shutil.rmtree(folder)
        self.row("durable sends, 64 clients / bare asyncio server", statistics.median(rates), statistics.median(floors), "/s", SHARE, 0.5)

    def live(self):
        """What is pushed to subscribers, frames, and catching up."""
        self.notifications()
        self.bystanders()
        self.who_stops_reading()
        self.frames()
        self.catching_up()

    def notifications(self):
        """From a send to the read of 1, 100 and 1,000 subscribers."""
        repo = self.repo("told")
        repo.start()
        with repo.client() as client:
            repo.join(client, "sender", "receiver")
        echo = subprocess.Popen(helper_argv("echo", self.scratch), env=CLEAN, stdout=subprocess.PIPE)
        try:
            port = int(echo.stdout.readline())
            for count, rounds in ((1, 1_000), (100, 400), (1_000, 100)):
                measured, floor = helper("told", repo.path, port, count, self.rounds(rounds))
                for what, value, beside, limit in (("p50", measured[0], floor[0], ()), ("p99", measured[1], floor[1], (TIMES, 2))):
                    self.row(f"notification to {count:,}, {what} / the same sync and bytes by asyncio", value, beside, "ms", *limit)
        finally:
            echo.kill()
            echo.wait()
            echo.stdout.close()
        repo.stop()

    def bystanders(self):
        """Sends while 1,000 listen to something else, beside sends to a store with as many people of whom none is there."""
        repos, crowds = [self.repo("alone"), self.repo("watched")], []
        others = {"scope": {"type": "module", "value": "other"}, "mention_role": "nobody"}
        try:
            for repo, wanted in zip(repos, (None, others)):
                repo.start()
                with repo.client() as client:
                    repo.join(client, *(f"c{n}" for n in range(CONNECTIONS)))
                argv = helper_argv("hold", repo.path, 1_000, json.dumps(wanted))
                crowds.append(subprocess.Popen(argv, env=CLEAN, stdout=subprocess.PIPE))
                if not crowds[-1].stdout.readline():
                    raise SystemExit("the subscribers failed")
            crowds[0].kill()
            crowds[0].wait()
            for clients, each in ((1, 200), (CONNECTIONS, 20)):
                rates = [[], []]
                for number in range(self.rounds(24) + 1):
                    for repo, found in zip(repos, rates):
                        done = helper("senders", repo.places.var, "thrum.sock", "c", clients, each)
                        if number:
                            found.append(done["messages"] / done["seconds"])
                alone, watched = map(statistics.median, rates)
                who = "one client" if clients == 1 else f"{clients} clients"
                self.row(f"sends of {who}, 1,000 listen to others / nobody listens", watched, alone, "/s", SHARE, 0.95)
        finally:
            for crowd in crowds:
                crowd.kill()
                crowd.wait()
                crowd.stdout.close()
        for repo in repos:
            repo.stop()

    def who_stops_reading(self):
        """1,000 subscribers, and one more who does not read, beside 1,000 who all do."""
        repos = [self.repo("all read"), self.repo("one stops")]
        for repo in repos:
            repo.start()
            with repo.client() as client:
                repo.join(client, "sender", "receiver")
        found = helper("stopped", *(repo.path for repo in repos), 1_000, 600)
        for repo in repos:
            repo.stop()
        self.row("notification to 1,000, p99: one more does not read / all read", found["p99"][1], found["p99"][0], "ms", TIMES, 1.25)
        self.row("… memory that the daemon gains / when all read", found["grown"][1], found["grown"][0], "MB", PLUS, 8)
        self.row("… who did not read has been closed", float(found["closed"]), 1.0, "", SHARE, 1)

    def frames(self):
        """Frames of a client decoded, beside a loop that cuts and unmasks the same bytes and checks nothing."""
        for name, size, count in (("100 bytes", 100, 20_000), ("1 MiB", 1 << 20, 24)):
            stream = b"".join(thrum.encode_frame(thrum.TEXT, (b"%08d" % n).ljust(size, b"x"), mask=os.urandom(4)) for n in range(count))
            pieces = [stream[n:n + 65_536] for n in range(0, len(stream), 65_536)]      # as they come from a socket

            def decode(pieces=pieces, count=count):
                peer, found = thrum.WebSocket(1 << 21), 0
                for piece in pieces:
                    peer.feed(piece)
                    found += len(peer.messages())
                assert found == count

            def cut(pieces=pieces, count=count, size=size):
                rest, found, wide = b"", 0, {126: ">H", 127: ">Q"}
                for piece in pieces:
                    rest = rest + piece if rest else piece
                    at = 0
                    while len(rest) - at >= 14:
                        length, begin = rest[at + 1] & 127, at + 2
                        if length > 125:
                            (length,) = struct.unpack_from(wide[length], rest, begin)
                            begin += 2 if length < 65_536 else 8
                        if begin + 4 + length > len(rest):
                            break
                        mask, payload = rest[begin:begin + 4], rest[begin + 4:begin + 4 + length]
                        (int.from_bytes(payload, "big") ^ int.from_bytes(mask * (length // 4), "big")).to_bytes(length, "big")
                        at, found = begin + 4 + length, found + 1
                    rest = rest[at:]
                assert found == count

            measured, floor = self.in_turns(self.rounds(20), decode, cut, warm_up=2)
            self.row(f"frames decoded, {name} / a loop without checks", count / measured, count / floor, "/s", SHARE, 0.5)
            self.row("… megabytes", len(stream) / 1e6 / measured, len(stream) / 1e6 / floor, "MB/s")

    def catching_up(self):
        """10,000 messages over a WebSocket, beside their rows read and encoded in pages of the same size."""
        repo = self.repo(10_000)
        repo.start()
        places = repo.places
        with open(places.var + "/ws.port") as file:
            port = int(file.read())
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(thrum.request_upgrade(f"localhost:{port}", "/ws", "A" * 22 + "=="))
        buffer, peer = bytearray(), thrum.WebSocket(1 << 26, client=True)
        while not thrum.decode_response_head(buffer):
            buffer += sock.recv(65536)

        def call(method, **params):
            peer.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode())
            sock.sendall(peer.output())
            while True:
                for _, message in peer.messages():
                    message = json.loads(message)
                    if "result" in message:
                        return message["result"]
                    assert "method" in message, message
                peer.feed(sock.recv(65536))

        call("user.register", username="late")
        call("session.start", agent_id="user:late")

        def follow(method, **params):
            cursor, count = 0, 0
            while count < 10_000:
                found = call(method, after_seq=cursor, page_size=100, **params)["messages"]
                cursor, count = found[-1]["seq"], count + len(found)

        db = sqlite3.connect(places.database)
        db.row_factory = sqlite3.Row

        def floor():
            cursor, count = 0, 0
            while count < 10_000:
                found = [dict(row) for row in db.execute("select * from messages where seq > ? order by seq limit 100", (cursor,))]
                json.loads(json.dumps(found))       # as the client must
                cursor, count = found[-1]["seq"], count + len(found)

        listed, waited, floored = self.in_turns(self.rounds(12), lambda: follow("message.list", sort_order="asc"),
                                                lambda: follow("message.wait", all=True), floor)
        db.close()
        sock.close()
        repo.stop()
        self.row("catching up on 10,000 messages by message.list / rows as JSON", listed * 1e3, floored * 1e3)
        self.row("… by message.wait", waited * 1e3, floored * 1e3)

    def broadcast(self):
        """One message to 1,000 agents."""
        repo = Repo(self.scratch + "/thousand").fill(0, 1_000)
        self.repos["thousand"] = repo
        repo.start()
        store = thrum.Store(self.scratch + "/broadcast.db", thrum.World(), writable=True)
        store.create()
        with repo.client() as client:
            def send():
                return client.call("message.send", caller_agent_id="agent0", mentions=["@everyone"], content="the tests pass")

            seq = send()["seq"]
            tables = rows_by_seq(repo.places.database)
            rows = {table: [list(row) for row in tables[table][1].get(seq, ())] for table in WITH_SEQ}
            counter = 0

            def floor():
                nonlocal counter
                counter += 1
                own = {table: [[seq + counter if v == seq else f"{v}{counter}" if isinstance(v, str) and v[:4] in ("msg_", "evt_") else v
                                for v in row] for row in found] for table, found in rows.items()}
                start = time.perf_counter()
                store.db.execute("begin immediate")
                insert(store.db, tables, own)
                store.db.execute("commit")
                return time.perf_counter() - start

            spent, floors = [], []
            for number in range(self.rounds(100) + 5):
                one, other = floor(), clock(send)
                if number >= 5:
                    floors.append(one)
                    spent.append(other)
        store.close()
        repo.stop()
        self.row("broadcast to 1,000 agents / the same rows inserted", statistics.median(spent) * 1e3, statistics.median(floors) * 1e3,
                 "ms", TIMES, 2)

    def crowd(self):
        """1,000 agents in 50 groups: a broadcast to all of them, one group, and one agent."""
        repo = Repo(self.scratch + "/crowd").fill(0, 1_000)
        self.repos["crowd"] = repo
        repo.start()
        with repo.client() as client:
            for group in range(50):
                client.call("group.create", name=f"group{group}")
                for agent in range(20):
                    client.call("group.member.add", group=f"group{group}", member_value=f"agent{group * 20 + agent}")
            ways = [["@agent7"], ["@group3"], ["@everyone"], []]
            one, group, everyone, nobody = self.in_turns(
                self.rounds(100), *(lambda to=to: client.call("message.send", caller_agent_id="agent0", mentions=to, content="green")
                                    for to in ways), warm_up=5)
        repo.stop()
        for what, seconds in (("to a group of 20", group), ("to @everyone", everyone), ("without a name", nobody)):
            self.row(f"1,000 agents, 50 groups: {what} / to one agent", seconds * 1e3, one * 1e3)

    def outbox(self):
        """A page of what an agent sent, of much and of little."""
        repo = Repo(self.scratch + "/outbox")
        self.repos["outbox"] = repo
        repo.start()
        with repo.client() as client:
            repo.join(client, "little", "much", "reader")
            for sender, count in (("little", 100), ("much", 10_000)):
                line = b"".join(json.dumps({"jsonrpc": "2.0", "method": "message.send", "params": {
                    "caller_agent_id": sender, "mentions": ["@reader"], "content": f"report {n}"}}).encode() + b"\n" for n in range(count))
                sock = thrum.dial(repo.places.var)
                sock.sendall(line)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1):             # notifications are not answered: the end says that all are done
                    pass
                sock.close()
                assert client.call("message.outbox", caller_agent_id=sender)["total"] == count
            for what, more in (("page", {}), ("unread only", {"unread": True})):
                few, many = self.in_turns(self.rounds(300), *(
                    lambda sender=sender, more=more: client.call("message.outbox", caller_agent_id=sender, **more)
                    for sender in ("little", "much")), warm_up=10)
                self.row(f"outbox, {what}: 10,000 sent messages / 100", many * 1e3, few * 1e3, "ms", TIMES, 2)
        repo.stop()

    def search(self):
        """Full text over 100,000 messages, beside the same query in the sqlite3 module."""
        size = 10_000 if self.quick else 100_000
        repo = self.repo(size)
        repo.start()
        with repo.client() as client:
            begin = time.perf_counter()
            client.call("message.search", query="parser")
            self.row(f"first search in {size:,} messages that are not indexed yet", time.perf_counter() - begin, 0, "s")
            db = sqlite3.connect(repo.places.database)
            for what, query in SEARCHES.items():
                match = " ".join(f'"{word}"' for word in query.split())

                def floor(match=match):
                    return db.execute("select rowid from message_search where message_search match ? order by rank limit 10",
                                      (match,)).fetchall()

                assert len(client.call("message.search", query=query)["messages"]) == len(floor()) > 0, query
                asked, floored = self.in_turns(self.rounds(40), lambda query=query: client.call("message.search", query=query), floor)
                self.row(f"search, {what} / the same FTS5 query", asked * 1e3, floored * 1e3, "ms", TIMES_PLUS, 1.5, 3)
            db.close()
        repo.stop()

    def inbox(self):
        """A page and the unread count of stores of different sizes."""
        names, functions = [], []
        for size in self.sizes():
            repo = self.repo(size)
            repo.start()
            client, store = repo.client(), thrum.Store(repo.places.database, thrum.World())
            for what, more in (("page", {"for_agent": "{}"}), ("unread count", {"unread_for_agent": "{}", "page_size": 1})):
                turn = iter(range(1 << 30))

                def over_rpc(client=client, more=more, turn=turn):
                    agent = f"agent{next(turn) * 7 % AGENTS}"
                    found = client.call("message.list", **{k: agent if v == "{}" else v for k, v in more.items()})
                    assert found["messages"] and found["unread"], found

                def in_store(store=store, unread=what != "page", turn=turn):
                    agent = f"agent{next(turn) * 7 % AGENTS}"
                    found = store.within(10, lambda: store.page(receiver=agent, unread=unread, limit=1 if unread else 10))
                    assert found["messages"] and found["unread"], found

                names += [(size, what, "JSON-RPC"), (size, what, "store")]
                functions += [over_rpc, in_store]
        spent = dict(zip(names, self.in_turns(self.rounds(600), *functions, warm_up=20)))
        for what in ("page", "unread count"):
            for way in ("JSON-RPC", "store"):
                for size in self.sizes()[1:]:
                    self.row(f"inbox {what}, {way}: {size:,} messages / 10,000", spent[size, what, way] * 1e3,
                             spent[10_000, what, way] * 1e3, "ms", TIMES, 2)
        for size in self.sizes():
            self.repo(size).stop()

    def work(self):
        """What git knows, in ten worktrees of 5,000 files, in each of which an agent edits."""
        repo = Repo(self.scratch + "/work")
        self.repos["work"] = repo

        def git(*args, cwd=repo.path):
            subprocess.run(["git", "-c", "user.name=b", "-c", "user.email=b@localhost", *args], cwd=cwd, env=CLEAN, check=True,
                           capture_output=True)
        for n in range(FILES):
            os.makedirs(f"{repo.path}/src/d{n // 100}", exist_ok=True)
            with open(f"{repo.path}/src/d{n // 100}/f{n}.py", "w") as file:
                file.writelines(f"line {line} of {n}\n" for line in range(20))
        git("add", "-A")
        git("commit", "-q", "-m", "files")
        tops = [f"{repo.path}-{n}" for n in range(WORKTREES)]
        for n, top in enumerate(tops):
            git("worktree", "add", "-q", "-b", f"b{n}", top)
            thrum.set_up_worktree(top, repo.path)
            with open(f"{top}/src/d0/f{n}.py", "a") as file:
                file.write("more\n")
            with open(f"{top}/src/d1/f100.py", "a") as file:
                file.write(f"of {n}\n")
        repo.start()
        os.chdir(tops[0])
        launcher = tops[0] + "/.thrum/bin/thrum"
        run([launcher, "quickstart", "--name", "a0", "--role", "coder", "--module", "m0"])
        with repo.client() as client:
            for n, top in enumerate(tops[1:], 1):
                client.call("agent.register", name=f"a{n}", role="coder", module=f"m{n}")
                client.call("session.start", agent_id=f"a{n}", refs=[{"type": "worktree", "value": top}])
            session = client.call("agent.whoami", caller_agent_id="a0")["session_id"]
            actions = {
                "who-has, in ten worktrees": lambda: client.call("work.whoHas", file="src/d0/f1.py"),
                "… by the launcher": lambda: run([launcher, "who-has", "src/d0/f1.py"]),
                "heartbeat": lambda: client.call("session.heartbeat", session_id=session),
                "… by the launcher ": lambda: run([launcher, "session", "heartbeat"])}
            more = {"who-has of a file that all ten edit": lambda: client.call("work.whoHas", file="src/d1/f100.py"),
                    "team": lambda: client.call("team.list"),
                    "conflicts of 45 pairs, nothing has changed": lambda: client.call("conflict.list")}
            first = clock(more["conflicts of 45 pairs, nothing has changed"])
            status = [shutil.which("git"), "status"]
            spent = self.in_turns(self.rounds(24), lambda: run(status), *actions.values(), *more.values(), warm_up=2)
            for what, seconds in zip(actions, spent[1:]):
                self.row(f"{what} / one git status", seconds * 1e3, spent[0] * 1e3, "ms", TIMES, 3)
            for what, seconds in zip(more, spent[1 + len(actions):]):
                self.row(f"{what} / one git status", seconds * 1e3, spent[0] * 1e3)
            self.row("conflicts of 45 pairs, for the first time / one git status", first * 1e3, spent[0] * 1e3)
            claimed, freed = [], []
            for n in range(self.rounds(200)):
                claimed.append(clock(client.call, "claim.take", paths=[f"src/d{n % 50}"], caller_agent_id="a0"))
                freed.append(clock(client.call, "claim.release", caller_agent_id="a0"))
            self.row("claim and release, durable", statistics.median(claimed) * 1e3 + statistics.median(freed) * 1e3, 0)
            for n in range(1, WORKTREES):
                client.call("claim.take", paths=[f"a{n}/x{i}" for i in range(100)], caller_agent_id=f"a{n}")
            paths = [f"a{n % 9 + 1}/x{n % 100}/y/{n}.py" for n in range(1_000)]
            self.row("whether 1,000 files touch 900 claims", statistics.median(
                [clock(client.call, "claim.check", paths=paths) for _ in range(5)]) * 1e3, 0)
        repo.stop()

    def start(self):
        """Daemon starts: warm, first, after kill -9."""
        sizes = ["nothing", *self.sizes()]
        repos = [self.repo(size) for size in sizes]
        spent = collections.defaultdict(list)
        for repo in repos:
            repo.start()
            repo.stop()
        for _ in range(self.rounds(12)):
            spent["floor"].append(clock(run, NEEDED))
            for size, repo in zip(sizes, repos):
                spent[size].append(clock(repo.start))
                repo.kill()
                spent[size, "killed"].append(clock(repo.start))
                repo.stop()
            first = repos[0].places
            shutil.rmtree(first.var)
            shutil.rmtree(os.path.dirname(first.copy) + "/__pycache__", ignore_errors=True)
            spent["first"].append(clock(repos[0].start))
            repos[0].stop()
        spent = {name: statistics.median(values) for name, values in spent.items()}
        self.row("first start, nothing cached / import asyncio, sqlite3", spent["first"] * 1e3, spent["floor"] * 1e3, "ms", TIMES, 3)
        self.row("warm start, empty store / import asyncio, sqlite3", spent["nothing"] * 1e3, spent["floor"] * 1e3, "ms")
        for size in self.sizes():
            self.row(f"warm start, {size:,} messages / empty store", spent[size], spent["nothing"], "s", PLUS, 0.3)
        for size in sizes:
            what = f"{size:,} messages" if isinstance(size, int) else "empty store"
            self.row(f"start after kill -9, {what} / warm, empty store", spent[size, "killed"], spent["nothing"], "s")

    def rebuild(self):
        """The database made anew from the journal of 100,000 messages."""
        size = 10_000 if self.quick else 100_000
        repo = self.repo(size)
        folder = self.scratch + "/floor"
        os.makedirs(folder)
        rates, floors, opened = [], [], []
        for _ in range(2 if self.quick else 3):
            done = helper("floor", repo.path, folder)
            floors.append(done["events"] / done["seconds"])
            drop_database(repo.places)
            done = helper("open", repo.path)
            rates.append(done["events"] / done["seconds"])
            opened.append(done["open"])
        self.row(f"rebuild of {size:,} messages / json.loads + same rows", statistics.median(rates), statistics.median(floors), "/s",
                 SHARE, 0.5)
        self.row("… opening the store without its database, all in all", statistics.median(opened), 0, "s")

    def memory(self):
        """The daemon's resident memory."""
        floor = []
        for _ in range(3):
            process = subprocess.Popen([PYTHON, "-c", IMPORTS + "\nprint(flush=True)\ninput()"], env=CLEAN, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE)
            process.stdout.readline()
            floor.append(rss(process.pid))
            process.communicate(b"\n")
        floor = statistics.median(floor)
        for size in ["idle", *self.sizes()]:
            repo = self.repo(size)
            repo.start()
            with repo.client() as client:
                if size != "idle":
                    for n in range(AGENTS * 4):
                        client.call("message.list", for_agent=f"agent{n % AGENTS}", page_size=50)
                client.call("health")
                measured = rss(thrum.read_pid(repo.places))
            repo.stop()
            if size == "idle":
                self.row("daemon memory, idle / import asyncio, sqlite3", measured, floor, "MB", TIMES, 2)
            else:
                self.row(f"daemon memory, {size:,} messages, after 200 pages", measured, floor, "MB", TIMES, 4)

    def close(self):
        os.chdir("/")
        for repo in self.repos.values():
            try:
                repo.stop()
            except thrum.ThrumError as error:
                print(f"{repo.path}: {error}", file=sys.stderr)


def number(value, unit):
    digits = 0 if unit in ("/s", "") or value >= 1_000 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


GROUPS = ("command", "surface", "parallel", "send", "clients", "live", "broadcast", "crowd", "inbox", "outbox", "search", "work", "start",
          "rebuild", "memory")


def main():
    if sys.argv[1:2] == ["--helper"]:
        load(sys.argv[3])
        print(json.dumps(HELPERS[sys.argv[2]](*sys.argv[4:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--large", action="store_true", help="also with 1,000,000 messages")
    parser.add_argument("--only", default="", metavar="WORD", help="only the groups whose name contains this")
    parser.add_argument("--file", default=ROOT + "/thrum.py", help="the thrum.py to measure")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("THRUM_", "GIT_"))]:
        del os.environ[name]
    groups = [name for name in GROUPS if options.only in name]
    if not groups:
        parser.error(f"--only: no group is called {options.only}; there are {', '.join(GROUPS)}")
    # What somebody saves meanwhile must not change what is measured, hence a copy.
    scratch = tempfile.mkdtemp(prefix="thrum-bench-")
    os.makedirs(scratch + "/site")
    shutil.copy(options.file, scratch + "/site/thrum.py")
    load(scratch + "/site")
    bench = Bench(scratch, options.quick, options.large)
    print(f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores, {sys.platform}, load "
          f"{os.getloadavg()[0]:.1f}\n")
    print(f"{'what':<64} | {'measured':>13} | {'floor':>13} | {'ratio':>8} | {'budget':<13} | met?")
    print("-" * 132)
    try:
        for name in groups:
            getattr(bench, name)()
    finally:
        bench.close()
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{bench.missed} of the budgets missed" if bench.missed else "\nall budgets met")
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
