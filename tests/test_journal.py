"""Section 8: the append-only files; what a crash, a full disk or damage leaves of them."""

import errno
import json
import os
import random

import pytest

import thrum
from conftest import FakeWorld
from generate import fill, history


def opened(directory):
    """A journal and what opening it said."""
    journal = thrum.Journal(str(directory), FakeWorld(), thrum.BadLines(str(directory) + ".bad"))
    return journal, journal.open()


def created(directory, lines=()):
    journal, found = opened(directory)
    assert not found
    journal.create()
    if lines:
        journal.append(list(lines))
    return journal


def read_all(journal, after=0):
    return list(journal.read(after))


LINES = [f'{{"event_id":"evt_{n}","n":"{"x" * n}"}}'.encode() for n in range(12)]


def numbered(lines, first=1):
    return list(enumerate(lines, first))


def contents(directory):
    found = {}
    for name in sorted(os.listdir(directory)):
        with open(f"{directory}/{name}", "rb") as file:
            found[name] = file.read()
    return found


# ---- the format

def test_a_new_journal(tmp_path):
    """The first line names the epoch and the first sequence; then one line for each event, no more."""
    journal = created(tmp_path / "j", LINES[:2])
    header = {"epoch": journal.epoch, "first": 1, "v": 1}
    assert contents(tmp_path / "j") == {"1.jsonl": b"\n".join([thrum.canonical(header), *LINES[:2], b""])}
    assert (journal.last, len(journal.epoch), read_all(journal)) == (2, 16, numbered(LINES[:2]))
    assert os.stat(tmp_path / "j").st_mode & 0o777 == 0o700
    assert os.stat(tmp_path / "j" / "1.jsonl").st_mode & 0o777 == 0o600


def test_it_goes_on_where_it_was(tmp_path):
    journal = created(tmp_path / "j", LINES[:3])
    epoch = journal.epoch
    journal.close()
    journal, found = opened(tmp_path / "j")
    assert (found, journal.mended, journal.last, journal.epoch) == (True, False, 3, epoch)
    journal.append(LINES[3:5])
    assert read_all(journal) == numbered(LINES[:5])
    assert read_all(journal, 3) == numbered(LINES[3:5], 4)
    assert read_all(journal, 5) == read_all(journal, 99) == []


def test_no_journal(tmp_path):
    for made in (lambda: None, lambda: os.makedirs(tmp_path / "j", exist_ok=True)):
        made()
        assert opened(tmp_path / "j")[1] is False


def test_segments(tmp_path, monkeypatch):
    """Any batches over any number of files read as one, from any sequence, also after each reopening."""
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 150)
    for seed in range(8):
        rng, directory = random.Random(seed), tmp_path / str(seed)
        journal, written = created(directory), []
        while len(written) < 40:
            batch = [rng.choice(LINES) for _ in range(rng.randrange(1, 6))]
            journal.append(batch)
            written += batch
            assert journal.last == len(written)
            if rng.random() < 0.2:
                epoch = journal.epoch
                journal.close()
                journal, found = opened(directory)
                assert (found, journal.mended, journal.last, journal.epoch) == (True, False, len(written), epoch)
        assert len(os.listdir(directory)) > 3
        for after in range(len(written) + 2):
            assert read_all(journal, after) == numbered(written[after:], after + 1), f"seed {seed}"
        for name, data in contents(directory).items():
            header = json.loads(data.split(b"\n")[0])
            assert header == {"epoch": journal.epoch, "first": int(name[:-6]), "v": 1}
        journal.close()


def test_the_generator_writes_the_same_format(tmp_path, monkeypatch):
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 20_000)
    count = fill(tmp_path / "j", 100, agents=5)
    journal, found = opened(tmp_path / "j")
    assert (found, journal.mended, journal.last) == (True, False, count)
    assert len(os.listdir(tmp_path / "j")) > 3
    sequences = [(sequence, thrum.parse_line(line)[0]["sequence"]) for sequence, line in journal.read()]
    assert sequences == [(n, n) for n in range(1, count + 1)]
    journal.append([b"{}"])
    assert read_all(journal, count) == [(count + 1, b"{}")]


# ---- crashes

@pytest.mark.parametrize("segment", [1 << 30, 60])
def test_a_journal_cut_anywhere(tmp_path, monkeypatch, segment):
    """Cut after any byte of its last file: whole lines stay, the rest is set aside, and it goes on after them.

    Only where the first line itself is gone is there no journal to be trusted.
    """
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", segment)
    journal = created(tmp_path / "whole")
    for line in LINES[:5]:
        journal.append([line])
    journal.close()
    whole = contents(tmp_path / "whole")
    name = max(whole, key=lambda name: int(name[:-6]))
    first, data = int(name[:-6]), whole[name]
    for cut in range(len(data) + 1):
        directory = tmp_path / f"cut{cut}"
        os.mkdir(directory)
        for other, content in {**whole, name: data[:cut]}.items():
            (directory / other).write_bytes(content)
        journal, found = opened(directory)
        if cut <= data.index(b"\n"):
            assert found is False, f"cut {cut}: the first line is incomplete"
            continue
        kept = LINES[:first - 1 + data[:cut].count(b"\n") - 1]
        torn = data[:cut].rpartition(b"\n")[2]
        assert (found, journal.last, journal.mended) == (True, len(kept), bool(torn)), f"cut {cut}"
        assert read_all(journal) == numbered(kept), f"cut {cut}"
        journal.append([b'{"new":1}'])
        assert read_all(journal) == numbered([*kept, b'{"new":1}']), f"cut {cut}"
        journal.close()
        journal, found = opened(directory)
        assert (found, journal.last, journal.mended) == (True, len(kept) + 1, False), f"cut {cut}"
        journal.close()
        if torn:
            with open(str(directory) + ".bad") as file:
                assert json.loads(file.read())["line"] == torn.decode()


@pytest.mark.parametrize("damage", [b"garbage\n", b"\n", b'{"event_id":"evt_9"}\n', b'{"epoch":5,"first":1,"v":1}\n',
                                    b'{"epoch":"0123456789abcdef","first":2,"v":1}\n', b"\xff\xfe\n", b"x" * 10_000 + b"\n"], ids=repr)
def test_a_damaged_first_line_is_not_trusted(tmp_path, damage):
    created(tmp_path / "j", LINES[:2]).close()
    path = tmp_path / "j" / "1.jsonl"
    path.write_bytes(damage + path.read_bytes().partition(b"\n")[2])
    assert opened(tmp_path / "j")[1] is False


def test_set_aside_keeps_the_files(tmp_path):
    journal = created(tmp_path / "j", LINES[:2])
    journal.close()
    before = contents(tmp_path / "j")
    journal.set_aside()
    assert journal.mended and not os.path.exists(tmp_path / "j")
    assert contents(tmp_path / "j.damaged") == before


def test_damaged_lines_keep_their_numbers(tmp_path):
    created(tmp_path / "j", LINES[:4]).close()
    path = tmp_path / "j" / "1.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0\xff garbage"
    path.write_bytes(b"\n".join(lines))
    journal, found = opened(tmp_path / "j")
    assert found and read_all(journal) == numbered([LINES[0], b"\0\xff garbage", *LINES[2:4]])


# ---- full disks

def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_some(count):
    """An os.write that writes so many bytes in all, then finds the disk full."""
    real, left = os.write, [count]

    def write(descriptor, data):
        if not left[0]:
            no_space()
        done = real(descriptor, bytes(data)[:left[0]])
        left[0] -= done
        return done
    return write


@pytest.mark.parametrize("fault", ["write at once", "write midway", "write a whole line", "sync", "truncate too"])
def test_a_failed_append_leaves_nothing(tmp_path, monkeypatch, fault):
    """And the next one, when there is room again, is where it belongs."""
    journal = created(tmp_path / "j", LINES[:2])
    before = contents(tmp_path / "j")
    with monkeypatch.context() as patch:
        if fault == "sync":
            patch.setattr(thrum, "durable_sync", no_space)
        else:
            patch.setattr(os, "write", write_some({"write at once": 0, "write a whole line": len(LINES[2]) + 1}.get(fault, 9)))
        if fault == "truncate too":
            patch.setattr(os, "ftruncate", no_space)
        with pytest.raises(OSError, match="No space"):
            journal.append(LINES[2:4])
    assert journal.last == 2
    if fault != "truncate too":
        assert contents(tmp_path / "j") == before
    journal.append(LINES[4:6])
    expected = numbered([*LINES[:2], *LINES[4:6]])
    assert (journal.last, read_all(journal)) == (4, expected)
    journal.close()
    journal, found = opened(tmp_path / "j")
    assert (found, journal.mended, read_all(journal)) == (True, False, expected)


def test_a_new_file_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(thrum, "JOURNAL_FILE_MAX", 60)
    journal = created(tmp_path / "j", LINES[:4])
    before = contents(tmp_path / "j")
    for name in ("durable_sync", "write_all"):
        with monkeypatch.context() as patch:
            patch.setattr(thrum, name, no_space)
            with pytest.raises(OSError, match="No space"):
                journal.append(LINES[4:5])
        assert (contents(tmp_path / "j"), journal.last) == (before, 4)
    journal.append(LINES[4:5])
    assert read_all(journal) == numbered(LINES[:5])
    assert len(contents(tmp_path / "j")) == 2


def test_an_append_is_taken_back(tmp_path):
    journal = created(tmp_path / "j", LINES[:2])
    before = contents(tmp_path / "j")
    journal.append(LINES[2:6])
    journal.take_back(LINES[2:6])
    assert (contents(tmp_path / "j"), journal.last) == (before, 2)
    journal.append(LINES[6:7])
    assert read_all(journal) == numbered([*LINES[:2], LINES[6]])


def test_lines_are_synced_before_append_returns(tmp_path, monkeypatch):
    journal, order = created(tmp_path / "j"), []
    real_write, real_sync = thrum.write_all, thrum.durable_sync
    monkeypatch.setattr(thrum, "write_all", lambda *a: (order.append("write"), real_write(*a)))
    monkeypatch.setattr(thrum, "durable_sync", lambda *a: (order.append("sync"), real_sync(*a)))
    journal.append(LINES[:5])
    assert order == ["write", "sync"], "one write and one sync for all lines"


# ---- branch files

def branch(tmp_path):
    os.makedirs(tmp_path / "sync" / "messages")
    return thrum.Branch(str(tmp_path / "sync"))


def branch_files(tmp_path):
    root = str(tmp_path / "sync")
    return {os.path.relpath(path, root): path for path in thrum.log_files(root)}


def test_lines_go_to_the_file_of_their_stem(tmp_path):
    files = branch(tmp_path)
    files.append([("events", LINES[0]), ("messages/ada", LINES[1]), ("events", LINES[2]), ("messages/user_dana", LINES[3])])
    files.append([("messages/ada", LINES[4])])
    found = {name: open_lines(path) for name, path in branch_files(tmp_path).items()}
    assert found == {"events.jsonl": [LINES[0], LINES[2]], "messages/ada.jsonl": [LINES[1], LINES[4]],
                     "messages/user_dana.jsonl": [LINES[3]]}
    assert files.dirty == set(branch_files(tmp_path).values())
    files.sync()
    assert not files.dirty


def open_lines(path):
    with open(path, "rb") as file:
        data = file.read()
    assert data.endswith(b"\n")
    return data.split(b"\n")[:-1]


def test_branch_files_have_segments(tmp_path, monkeypatch):
    """A file is closed before it passes the limit; the next is numbered, and nobody else's name can be the same."""
    monkeypatch.setattr(thrum, "BRANCH_FILE_MAX", 200)
    files, rng, written = branch(tmp_path), random.Random(1), {"events": [], "messages/events": [], "messages/ada": []}
    for _ in range(40):
        items = [(rng.choice(list(written)), rng.choice(LINES)) for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.2:
            files = thrum.Branch(files.root)        # another start
        files.append(items)
        for stem, line in items:
            written[stem].append(line)
    seen = set()
    for stem, lines in written.items():
        paths = files.files(stem)
        assert len(paths) > 2 and not seen & set(paths)
        seen.update(paths)
        assert [line for path in paths for line in open_lines(path)] == lines
        assert all(os.path.getsize(path) <= 200 for path in paths)
    assert os.path.basename(files.path("events", 2)) == "events.log.2.jsonl"
    assert seen == set(branch_files(tmp_path).values()), "all of them are found when the log is read"


def test_a_torn_branch_file_does_not_swallow_the_next_line(tmp_path):
    files = branch(tmp_path)
    files.append([("messages/ada", LINES[0]), ("messages/ada", LINES[1])])
    path = files.path("messages/ada")
    os.truncate(path, os.path.getsize(path) - 4)
    thrum.Branch(files.root).append([("messages/ada", LINES[2])])
    lines = open_lines(path)
    assert lines[0] == LINES[0] and lines[-1] == LINES[2]


def test_lines_of_others_in_a_branch_file_stay(tmp_path):
    """The file was replaced or appended to by a sync meanwhile."""
    files = branch(tmp_path)
    files.append([("messages/ada", LINES[0])])
    path = files.path("messages/ada")
    thrum.atomic_write(path, LINES[5] + b"\n" + LINES[0] + b"\n")
    files.append([("messages/ada", LINES[1])])
    assert open_lines(path) == [LINES[5], LINES[0], LINES[1]]


def test_a_link_in_the_place_of_a_branch_file_is_not_followed(tmp_path):
    """The branch comes from elsewhere: a link in it must not make thrum write into another file."""
    files = branch(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    os.symlink(victim, files.path("messages/ada"))
    with pytest.raises(OSError):
        files.append([("messages/ada", LINES[0])])
    assert victim.read_bytes() == b"mine"
    assert thrum.log_files(files.root) == []


# ---- reading without a daemon

def test_read_log(tmp_path):
    """Of a branch or of a file: every event once, damaged lines and first lines left out, any length."""
    events = history(1)[:6]
    files = branch(tmp_path)
    lines = [thrum.canonical(event) for event in events]
    long = thrum.canonical({**events[0], "event_id": "evt_long", "padding": "x" * 3_000_000})
    files.append([("events", lines[0]), ("events", b"garbage"), ("events", lines[1]), ("messages/ada", lines[1]), ("messages/ada",
    lines[2]),
                  ("messages/ada", b'{"type":"x"}'), ("messages/bob", long), ("messages/bob", b'{"epoch":"0","first":1,"v":1}')])
    with open(files.path("messages/bob"), "ab") as file:
        file.write(lines[3])        # torn: no newline
    os.symlink(files.path("events"), files.path("messages/link"))
    assert [event["event_id"] for event in thrum.read_log(files.root)] == \
        [event["event_id"] for event in events[:3]] + ["evt_long"]
    assert list(thrum.read_log(files.path("events"))) == events[:2]
    created(tmp_path / "j", lines).close()
    assert list(thrum.read_log(str(tmp_path / "j"))) == events


def test_read_log_of_nothing(tmp_path):
    assert list(thrum.read_log(str(tmp_path))) == []
    with pytest.raises(OSError):
        list(thrum.read_log(str(tmp_path / "missing.jsonl")))


def test_bad_lines_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(thrum, "BAD_LINES_MAX", 1000)
    bad = thrum.BadLines(str(tmp_path / "bad.jsonl"))
    for n in range(50):
        bad.add("some.jsonl", b"\xff\0<garbage>" * 5, f"reason {n}")
    assert bad.count == 50
    assert 1000 <= os.path.getsize(bad.path) < 1400
    entries = [json.loads(line) for line in open_lines(bad.path)]
    assert entries[0]["reason"] == "reason 0" and entries[0]["file"] == "some.jsonl"
    thrum.BadLines(str(tmp_path / "no" / "where")).add("x", b"y", "z")
