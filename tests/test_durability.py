"""What was acknowledged is never lost: kill -9, damaged files, full and read-only disks, many at once.

The rounds run as users run: senders are processes that go through the launcher, the daemon is killed under them, and
nobody does anything by hand in between.  What needs an exact point of failure runs on a ledger in this process.
"""

import collections
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import thrum
from conftest import CLEAN, QUICK, FakeWorld, Repo

pytestmark = pytest.mark.slow

LONG = 60           # seconds after which something that should have happened has not
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit or mount")


# ---- helpers

def until(condition, what, seconds=LONG):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.005)
    return value


def events_of(paths):
    """The events in files, bad lines and headers left out; each line, so that a doubled one shows."""
    found = []
    for path in paths:
        for line in thrum.read_lines(str(path)):
            try:
                found.append(thrum.parse_line(line)[0])
            except ValueError:
                continue
    return found


def message_counts(paths):
    return collections.Counter(e["message_id"] for e in events_of(paths) if e["type"] == "message.create")


class Field:
    """A repository with eight senders, s0 to s7, and the reader bob, all known to the daemon."""

    COUNT = 8

    def __init__(self, repo):
        self.repo = repo
        thrum.initialize(str(repo.path))
        with repo.client() as client:
            client.call("agent.register", name="bob", role="reader", module="core")
            for n in range(self.COUNT):
                client.call("agent.register", name=f"s{n}", role="sender", module=f"m{n}")
                client.call("session.start", agent_id=f"s{n}")
        self.acknowledged = {}      # message id -> text
        self.problems = []
        self.lock = threading.Condition()

    @property
    def var(self):
        return self.repo.var

    @property
    def branch(self):
        return self.repo.path / ".git" / "thrum-sync" / "a-sync"

    def send(self, sender, text):
        """One send by a process; what it was told is noted."""
        done = subprocess.run([str(self.repo.launcher), "send", text, "--to", "@bob", "--json"], cwd=self.repo.path,
                              env={**CLEAN, "THRUM_AGENT_ID": f"s{sender}"}, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=LONG)
        with self.lock:
            try:
                assert done.returncode == 0
                self.acknowledged[json.loads(done.stdout)["message_id"]] = text
            except (AssertionError, ValueError, KeyError):
                self.problems.append(done)
            self.lock.notify_all()

    def round(self, number, each, kills):
        """All senders send `each` messages at once; the daemon is killed when so many were acknowledged (`kills`)."""
        begin = len(self.acknowledged)

        def work(sender):
            for n in range(each):
                self.send(sender, f"round {number} sender {sender} message {n}")
        threads = [threading.Thread(target=work, args=(sender,)) for sender in range(self.COUNT)]
        for thread in threads:
            thread.start()
        for count in kills:
            with self.lock:
                assert self.lock.wait_for(lambda count=count: len(self.acknowledged) - begin >= count or self.problems, LONG)
            self.kill()
        for thread in threads:
            thread.join(LONG)
            assert not thread.is_alive()
        assert not self.problems, self.problems[0]
        assert len(self.acknowledged) - begin == each * self.COUNT, "every send returned an id, over every kill"

    def kill(self):
        """Kill whichever daemon is there; the senders may start the next one at once."""
        with contextlib.suppress(OSError, ValueError, ProcessLookupError):
            os.kill(self.repo.pid(), signal.SIGKILL)

    def client(self):
        """A client of a daemon that has answered: a victim of the last kill may still accept connections for a moment."""
        def answered():
            with contextlib.suppress(thrum.ThrumError):
                client = self.repo.client()
                try:
                    client.call("health")
                    return client
                except thrum.ThrumError:
                    client.close()
        return until(answered, "a daemon")

    def rest(self):
        """Wait until the branch files have what the journal has: written just after the reply, or at the next start."""
        self.client().close()           # the last kill may have come after the last reply
        last = max(self.acknowledged)
        until(lambda: any(last.encode() in path.read_bytes() for path in self.branch.glob("messages/*.jsonl")), "branch files")

    def inbox(self):
        """Everything in bob's inbox: (message id, text) pairs; starts the daemon if it is gone."""
        with self.client() as client:
            found, page = [], 1
            while True:
                reply = client.call("message.list", for_agent="bob", page=page, page_size=100, sort_order="asc")
                found += [(m["message_id"], m["body"]["content"]) for m in reply["messages"]]
                if page >= reply["total_pages"]:
                    assert reply["total"] == len(found) == reply["unread"]
                    return found
                page += 1

    def check(self):
        """Each acknowledged message is in the inbox, once, with its text; and no send was doubled by its retry."""
        found = self.inbox()
        assert len({message_id for message_id, _ in found}) == len(found), "a message twice in the inbox"
        missing = {i: t for i, t in self.acknowledged.items() if (i, t) not in set(found)}
        assert not missing, f"{len(missing)} acknowledged messages are lost: {missing}"
        texts = collections.Counter(text for _, text in found)
        assert [text for text, count in texts.items() if count > 1] == [], "sent once, stored twice"

    def check_files(self):
        """After a stop: each once in the journal, once in the branch files, once in the database."""
        thrum.stop_daemon(thrum.find_places(str(self.repo.path)))
        expected = dict.fromkeys(self.acknowledged, 1)
        for what, paths in (("journal", (self.var / "journal").glob("*.jsonl")), ("branch", self.branch.glob("messages/*.jsonl"))):
            counts = message_counts(paths)
            assert {i: counts[i] for i in expected} == expected, what
        database = sqlite3.connect(str(self.var / "messages.db"))
        rows = collections.Counter(row[0] for row in database.execute("select message_id from messages"))
        deliveries = database.execute("select count(*) from deliveries d join agents a using(agent) where a.agent_id = 'bob'").fetchone()
        database.close()
        assert {i: rows[i] for i in expected} == expected and deliveries[0] == len(self.acknowledged)


@pytest.fixture
def field(repo):
    return Field(repo)


# ---- kill -9

def test_twenty_rounds_of_kill_under_eight_senders_lose_nothing(field):
    """The moments are chosen by seed; the other seven senders are then anywhere between `C` and `X`."""
    seeded = random.Random(2)
    for number in range(20):
        field.round(number, each=2, kills=[seeded.randrange(14)])
        field.check()
    field.check_files()


def damage_nothing(field, seeded):
    pass


def damage_deleted(field, seeded):
    for name in ("messages.db", "messages.db-wal", "messages.db-shm"):
        with contextlib.suppress(FileNotFoundError):
            (field.var / name).unlink()


def damage_only_database_deleted(field, seeded):
    (field.var / "messages.db").unlink()


def damage_truncated(field, seeded):
    with open(field.var / "messages.db", "rb+") as file:
        file.truncate(seeded.choice([0, 100, 4096, 10_000]))


def damage_garbage(field, seeded):
    (field.var / "messages.db").write_bytes(seeded.getrandbits(8 * 50_000).to_bytes(50_000, "big"))


def damage_page(field, seeded):
    """Some bytes in the middle of a database that otherwise looks well."""
    path = field.var / "messages.db"
    with sqlite3.connect(str(path)) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    database.close()
    with open(path, "rb+") as file:
        for page in range(2, max(3, os.stat(path).st_size // 4096 - 1)):
            file.seek(page * 4096)
            file.write(os.urandom(64))


def damage_wal(field, seeded):
    (field.var / "messages.db-wal").write_bytes(os.urandom(20_000))


def damage_old(field, seeded):
    """A database of some rounds ago, as a backup tool would put it back."""
    path = field.var.parent / "old.db"
    if path.exists():
        damage_deleted(field, seeded)
        shutil.copy(path, field.var / "messages.db")
    else:
        with sqlite3.connect(str(field.var / "messages.db")) as database, sqlite3.connect(str(path)) as copy:
            database.backup(copy)
        database.close()
        copy.close()


def last_journal(field):
    return max((field.var / "journal").glob("*.jsonl"), key=lambda path: int(path.stem))


def damage_cut(field, seeded):
    """The last line of the log, an acknowledged message, is cut in the middle; the branch file still has it."""
    path = last_journal(field)
    data = path.read_bytes()
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(data[:start + (len(data) - start) // 2])


def damage_torn(field, seeded):
    """Half of a line that nobody was promised, in the journal and in a branch file."""
    for path in (last_journal(field), next(field.branch.glob("messages/*.jsonl"))):
        with open(path, "ab") as file:
            file.write(b'{"agent_id":"s0","body":{"content":"half')


def damage_no_var(field, seeded):
    """Everything of this machine is gone; the journal is made anew from the branch files."""
    shutil.rmtree(field.var)


def damage_journal_header(field, seeded):
    path = last_journal(field)
    path.write_bytes(b"\0" + path.read_bytes()[1:])


DAMAGES = [damage_deleted, damage_truncated, damage_garbage, damage_cut, damage_only_database_deleted, damage_page, damage_wal,
           damage_torn, damage_old, damage_journal_header, damage_nothing, damage_no_var]


def test_rounds_of_kill_and_damage_lose_nothing(field):
    """As above, and the database is deleted, truncated, old or garbage, or the log's last line cut, between the rounds."""
    seeded = random.Random(3)
    field.round(100, each=1, kills=[])
    field.repo.kill()
    damage_old(field, seeded)       # the first time it keeps a copy for later
    for number, damage in enumerate(DAMAGES):
        field.round(number, each=1, kills=[seeded.randrange(7)])
        field.rest()
        field.repo.kill()
        damage(field, seeded)
        try:
            field.check()
        except (AssertionError, thrum.ThrumError) as error:
            raise AssertionError(f"after {damage.__name__}: {error}") from error
    field.check_files()


@pytest.mark.parametrize("damage", [damage_garbage, damage_truncated, damage_page])
def test_a_database_damaged_under_a_running_daemon_is_made_anew(field, damage):
    """No restart, no manual step: reads answer what is in the log, and sends go on."""
    for number in range(30):
        field.send(0, f"before {number}")
    with field.repo.client() as client:
        pid = client.call("health")["pid"]
    if damage is damage_page:
        damage(field, random.Random(4))
    else:
        with open(field.var / "messages.db", "rb+") as file:
            if damage is damage_garbage:
                file.write(os.urandom(os.fstat(file.fileno()).st_size))
            else:
                file.truncate(4096)
    field.check()
    for number in range(3):
        field.send(1, f"after {number}")
    assert not field.problems, field.problems
    field.check()
    assert field.repo.pid() == pid
    field.check_files()


def test_the_writer_too_notices_a_damaged_database(field):
    """Without any reader: the sends after the damage are stored, at the latest the second one."""
    for number in range(30):
        field.send(0, f"before {number}")
    with open(field.var / "messages.db", "rb+") as file:
        file.write(os.urandom(os.fstat(file.fileno()).st_size))
    with contextlib.suppress(OSError):
        os.truncate(field.var / "messages.db-wal", 0)
    field.send(1, "after 0")
    field.problems.clear()      # one refusal is honest; for ever is not
    for number in range(1, 4):
        field.send(1, f"after {number}")
    assert not field.problems, field.problems
    field.check()


# ---- many at once

def test_ten_clients_of_a_hundred_sends_each(field):
    """Vector 38: 1,000 ids, 1,000 messages, no error, and reads go on meanwhile."""
    ids, problems, totals, done = [], [], [], threading.Event()

    def work(number):
        try:
            with field.repo.client() as client:
                mine = [client.call("message.send", content=f"{number}/{n}", mentions=["@bob"], caller_agent_id=f"s{number % 8}")
                        for n in range(100)]
            ids.extend(reply["message_id"] for reply in mine)
            assert [reply["seq"] for reply in mine] == sorted(reply["seq"] for reply in mine)
        except Exception as error:
            problems.append(error)

    def read():
        try:
            with field.repo.client() as client:
                while not done.is_set():
                    found = client.call("message.list", for_agent="bob", page_size=20)
                    totals.append(found["total"])
                    assert found["unread"] == found["total"]
        except Exception as error:
            problems.append(error)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers + threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    done.set()
    for thread in readers:
        thread.join(LONG)
    assert not problems, problems
    assert len(set(ids)) == len(ids) == 1000
    assert len(set(totals)) > 3, "reads went on while sends did"
    found = field.inbox()
    assert sorted(i for i, _ in found) == sorted(ids)
    assert sorted(text for _, text in found) == sorted(f"{a}/{b}" for a in range(10) for b in range(100))
    field.acknowledged = dict(found)
    field.check_files()


def test_what_a_reply_said_every_connection_sees(field):
    """A read begun after a reply shows it, on any connection."""
    with field.repo.client() as writing, field.repo.client() as reading:
        for number in range(100):
            sent = writing.call("message.send", content=str(number), mentions=["@bob"], caller_agent_id="s0")
            found = reading.call("message.list", for_agent="bob", page_size=1)
            assert (found["messages"][0]["message_id"], found["total"]) == (sent["message_id"], number + 1)


# ---- full and read-only disks

def refused(done, *words):
    """One clear line and exit status 1; gives the line."""
    assert done.returncode == 1 and done.stdout == "", done
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert any(word in done.stderr for word in words), done.stderr
    return done.stderr


@linux
@pytest.mark.parametrize("room", [0, 10, 300])
def test_a_file_that_cannot_grow_refuses_and_recovers(field, room):
    """RLIMIT_FSIZE, set from outside, stops the journal (or the database) after `room` more bytes, in the middle of a line."""
    field.send(0, "before")
    field.rest()
    pid, journal = field.repo.pid(), last_journal(field)
    before, size = journal.read_bytes(), journal.stat().st_size
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + room if room else 0, hard))
    as_s0 = {"THRUM_AGENT_ID": "s0"}
    for text in ("refused one", "refused two"):
        line = refused(field.repo.run("send", text, "--to", "@bob", env=as_s0), "nothing was stored")
        assert "refused" not in line
    with field.repo.client() as client:
        assert client.call("message.list", for_agent="bob")["total"] == 1, "reads go on, and nothing was stored"
    assert journal.read_bytes() == before
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    field.send(0, "after")
    assert not field.problems and field.repo.pid() == pid
    field.check()
    field.check_files()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, and a function that fills it up; `fill()` gives the way to empty it."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@linux
def test_a_full_disk_refuses_in_one_line_and_recovers(small_disk):
    """ENOSPC for real: nothing stored, exit status 1, also at start and at init; afterwards everything works."""
    path = small_disk / "repo"
    path.mkdir()
    repo = Repo(path)
    repo.git("init", "-q", "-b", "main")
    repo.git("commit", "-q", "--allow-empty", "-m", "first")

    def fill():
        with open(small_disk / "filler", "wb", 0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    fill()
    refused(repo.run("init", command=QUICK), "No space left", "space", "git")
    assert not (path / ".thrum").exists() and repo.git("branch", "--list", "a-sync") == "", "a failed init leaves no trace"
    (small_disk / "filler").unlink()
    field = Field(repo)
    try:
        field.send(0, "before")
        field.rest()
        fill()
        as_s0 = {"THRUM_AGENT_ID": "s0"}
        # What fits into the last page of each file is stored; a message longer than a page does not fit.
        refused(repo.run("send", "refused " + "x" * 20_000, "--to", "@bob", env=as_s0), "nothing was stored")
        field.check()
        repo.kill()
        done = repo.run("send", "refused " + "x" * 20_000, "--to", "@bob", env=as_s0)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done
        (small_disk / "filler").unlink()
        field.send(0, "after")
        assert not field.problems, field.problems
        field.check()
        field.check_files()
    finally:
        (small_disk / "filler").unlink(missing_ok=True)
        repo.close()


@contextlib.contextmanager
def read_only(path):
    """The directory without the right to write: by mode, and for root, whom no mode stops, by a mount."""
    if os.geteuid():
        modes = {p: p.stat().st_mode for p in [path, *path.rglob("*")] if p.is_dir()}
        for folder in modes:
            folder.chmod(0o555)
        try:
            yield
        finally:
            for folder, mode in modes.items():
                folder.chmod(mode)
        return
    if subprocess.run(["mount", "--bind", str(path), str(path)], capture_output=True).returncode:
        pytest.skip("root without the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_read_only_directory_refuses_in_one_line_and_works_afterwards(field):
    repo, as_s0 = field.repo, {"THRUM_AGENT_ID": "s0"}
    field.send(0, "before")
    thrum.stop_daemon(thrum.find_places(str(repo.path)))
    journal = last_journal(field).read_bytes()
    with read_only(repo.path):
        for words in (["send", "refused", "--to", "@bob"], ["inbox"], ["daemon", "start"]):
            refused(repo.run(*words, env=as_s0), "Read-only", "Permission denied")
    assert last_journal(field).read_bytes() == journal
    field.send(0, "after")
    assert not field.problems, field.problems
    field.check()


def test_init_in_a_read_only_directory_says_so_and_leaves_nothing(make_repo):
    repo = make_repo()
    before = sorted(str(path) for path in repo.path.rglob("*"))
    with read_only(repo.path):
        for words in (["init"], ["quickstart", "--name", "ada", "--role", "planner", "--module", "core"]):
            refused(repo.run(*words, command=QUICK), "Read-only", "Permission denied", "not writable")
    assert sorted(str(path) for path in repo.path.rglob("*")) == before
    repo.ok("init")


# ---- exact points of failure, on a ledger in this process

class Desk:
    """A ledger with two agents; `crash()` leaves it as kill -9 would, and opens it again."""

    def __init__(self, top):
        (top / ".git" / "thrum-sync" / "a-sync" / "messages").mkdir(parents=True)
        self.places = thrum.Places(str(top), str(top / ".thrum"), str(top / ".git"))
        self.world = FakeWorld()
        self.open()
        for name, role in (("ada", "x"), ("bob", "y")):
            self.call("agent.register", name=name, role=role, module="core")
            self.call("session.start", agent_id=name)

    def open(self):
        self.ledger = thrum.Ledger(self.places, self.world)
        self.ledger.open("r_0123456789AB")

    def call(self, method, **params):
        self.world.at += thrum.NS
        row = thrum.METHODS[method]
        (outcome,), _ = self.ledger.commit([lambda context: row.handler(context, thrum.check_params(row, params))])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def send(self, text):
        return self.call("message.send", content=text, mentions=["@bob"], caller_agent_id="ada")["message_id"]

    def texts(self):
        return [m["content"] for m in self.ledger.store.page(receiver="bob", ascending=True, limit=100)["messages"]]

    def crash(self):
        """Nothing is flushed: the files stay as they are at this moment."""
        self.ledger.store.close()
        self.ledger.journal.close()
        self.open()

    def journal(self):
        return b"".join(path.read_bytes() for path in sorted(Path(self.places.journal).glob("*.jsonl")))


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path)
    yield made
    made.ledger.store.close()
    made.ledger.journal.close()


def fail(*args, **named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_sync_takes_the_whole_batch_back(desk, monkeypatch):
    desk.send("kept")
    before = desk.journal()
    monkeypatch.setattr(thrum, "durable_sync", fail)
    row = thrum.METHODS["message.send"]
    requests = [lambda context, n=n: row.handler(context, {"content": str(n), "mentions": ["@bob"], "caller_agent_id": "ada"})
                for n in range(3)]
    outcomes, events = desk.ledger.commit(requests)
    assert events == [] and all("nothing was stored: No space left" in str(outcome) for outcome in outcomes)
    monkeypatch.undo()
    assert desk.journal() == before and desk.texts() == ["kept"]
    desk.send("after")
    desk.crash()
    assert desk.texts() == ["kept", "after"]


def test_a_write_that_stops_in_the_middle_is_taken_back(desk, monkeypatch):
    before, real = desk.journal(), os.write

    def half(descriptor, data):
        real(descriptor, bytes(data)[:len(data) // 2])
        fail()
    monkeypatch.setattr(os, "write", half)
    with pytest.raises(thrum.ThrumError, match="nothing was stored"):
        desk.send("half")
    monkeypatch.undo()
    assert desk.journal() == before
    desk.send("whole")
    desk.crash()
    assert desk.texts() == ["whole"]


def test_what_cannot_even_be_taken_back_is_cut_off_before_the_next_append(desk, monkeypatch):
    """The disk fails, and truncating fails too: half a line stays, and must not swallow the next one."""
    real = os.write

    def half(descriptor, data):
        real(descriptor, bytes(data)[:len(data) // 2])
        fail()
    monkeypatch.setattr(os, "write", half)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(thrum.ThrumError, match="nothing was stored"):
        desk.send("half")
    monkeypatch.undo()
    desk.send("whole")
    assert desk.texts() == ["whole"]
    desk.crash()
    assert desk.texts() == ["whole"] and desk.ledger.bad_lines.count == 0


def test_a_failed_commit_of_the_database_leaves_no_line_in_the_journal(desk, monkeypatch):
    before = desk.journal()

    def full(self):
        raise sqlite3.OperationalError("database or disk is full")
    monkeypatch.setattr(thrum.Store, "commit", full)
    with pytest.raises(thrum.ThrumError, match="nothing was stored"):
        desk.send("refused")
    monkeypatch.undo()
    assert desk.journal() == before and desk.texts() == []
    desk.send("after")
    desk.crash()
    assert desk.texts() == ["after"]


def test_a_crash_between_journal_and_database_is_made_good(desk, monkeypatch):
    """The line is durable, the COMMIT is not: the next start applies it, under the same number."""
    class Killed(BaseException):
        pass

    def kill(self):
        raise Killed
    monkeypatch.setattr(thrum.Store, "commit", kill)
    with pytest.raises(Killed):
        desk.send("durable")
    monkeypatch.undo()
    last = desk.ledger.journal.last
    desk.ledger.store.rollback()
    desk.crash()
    assert desk.texts() == ["durable"] and desk.ledger.journal.last == last and desk.ledger.rebuilt == 1


@pytest.mark.parametrize("flushed", [True, False])
def test_every_cut_of_the_last_line_leaves_all_lines_before_it(desk, flushed):
    """Byte by byte: the torn line is set aside (or comes back from the branch file), nothing else changes."""
    desk.send("first")
    desk.ledger.flush(sync=True)
    desk.send("last")
    if flushed:
        desk.ledger.flush()
    desk.ledger.store.close()
    desk.ledger.journal.close()
    (name,) = os.listdir(desk.places.journal)
    path = f"{desk.places.journal}/{name}"
    data = Path(path).read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    shutil.copytree(desk.places.var, desk.places.var + ".saved")
    for cut in range(start + 1, len(data), max(1, (len(data) - start) // 12)):
        shutil.rmtree(desk.places.var)
        shutil.copytree(desk.places.var + ".saved", desk.places.var)
        os.truncate(path, cut)
        desk.open()
        assert desk.texts() == (["first", "last"] if flushed else ["first"]), cut
        assert desk.ledger.bad_lines.count == 1
        desk.ledger.store.close()
        desk.ledger.journal.close()
    desk.open()


def test_a_damaged_line_in_the_middle_costs_at_most_itself_and_keeps_all_numbers(desk):
    for text in ("one", "two", "three"):
        desk.send(text)
    numbers = {m["content"]: m["seq"] for m in desk.ledger.store.page(receiver="bob", limit=100)["messages"]}
    desk.ledger.store.close()
    desk.ledger.journal.close()
    (name,) = os.listdir(desk.places.journal)
    path = f"{desk.places.journal}/{name}"
    data = Path(path).read_bytes()
    at = data.index(b'"two"')
    with open(path, "wb") as file:
        file.write(data[:at] + b"\xff\xfe\x00\x01\x02" + data[at + 5:])
    os.unlink(desk.places.database)
    desk.open()
    found = {m["content"]: m["seq"] for m in desk.ledger.store.page(receiver="bob", limit=100)["messages"]}
    assert found == {text: seq for text, seq in numbers.items() if text != "two"} and desk.ledger.bad_lines.count == 1
    desk.send("four")
    desk.crash()
    assert [t for t in desk.texts() if t != "two"] == ["one", "three", "four"]


def test_branch_files_that_cannot_be_written_lose_nothing(desk, monkeypatch):
    """They are completed later: by the next flush, or by the next start after a crash."""
    monkeypatch.setattr(desk.ledger.branch, "append", fail)
    for number in range(5):
        desk.send(str(number))
        desk.ledger.flush()
    assert "No space left" in desk.ledger.export_problem
    monkeypatch.undo()
    desk.crash()
    branch = [path for path in thrum.log_files(desk.places.sync) if "messages" in path]
    assert sorted(message_counts(branch).values()) == [1] * 5
    desk.send("6")
    desk.ledger.flush(sync=True)
    assert desk.ledger.export_problem == "" and len(message_counts(branch)) == 6


def test_more_lines_than_may_wait_for_their_branch_file_are_not_forgotten(desk, monkeypatch):
    """The waiting list is bounded; what falls out of it must still reach the file, once the disk has room again."""
    monkeypatch.setattr(thrum, "EXPORT_MAX", 4)
    monkeypatch.setattr(desk.ledger.branch, "append", fail)
    for number in range(10):
        desk.send(str(number))
    monkeypatch.undo()
    desk.ledger.flush(sync=True)
    desk.ledger.close()
    desk.open()
    branch = [path for path in thrum.log_files(desk.places.sync) if "messages" in path]
    assert sorted(message_counts(branch).values()) == [1] * 10
