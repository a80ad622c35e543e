"""What agents do, as git says it: parsing, odd repositories, who-has against git's own answer, and what is never run."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import thrum
from conftest import CLEAN, USER, FakeWorld, Repo
from generate import answers, difference
from shapes import shape, shaped
from team import POISON, Team, error_line, finish, raw_in, start
from test_daemon import foreground, until  # noqa: F401
from test_methods import Team as Methods

GIT = ("git", *USER, "-c", "protocol.file.allow=always")


class Tree:
    """A worktree that is only looked at: no thrum in it."""

    def __init__(self, path, *init, commit=True):
        self.path, self.top = Path(path), str(path)
        if not self.path.exists():
            self.path.mkdir(parents=True)
            self.git("init", "-q", "-b", "main", *init)
            if commit:
                self.git("commit", "-q", "--allow-empty", "-m", "first")

    def git(self, *args, check=True, **more):
        """What the user's own git prints, as bytes."""
        return subprocess.run([*GIT, *args], cwd=self.top, env={**CLEAN, **more.pop("env", {})}, check=check,
                              capture_output=True, **more).stdout

    def file(self, name):
        return os.fsencode(self.top) + b"/" + os.fsencode(name)

    def put(self, name, data="one\ntwo\n"):
        os.makedirs(os.path.dirname(self.file(name)), exist_ok=True)
        with open(self.file(name), "wb") as file:
            file.write(os.fsencode(data))

    def commit(self, *names, message="work", data="one\ntwo\n", **env):
        """Write files and commit all there is."""
        for name in names:
            self.put(name, data)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message, env=env)

    def worktree(self, name, *more):
        self.git("worktree", "add", "-q", "-b", name, str(self.path.parent / name), *more)
        return Tree(self.path.parent / name)

    def work(self, world=None):
        common = thrum.git_dirs(self.top)[1]
        return thrum.Work(thrum.Places(self.top, self.top + "/.thrum", common), world or thrum.World({}))

    def facts(self, work=None):
        found = (work or self.work()).facts(self.top)
        shaped({"session_id": "s", "agent_id": "a", **found}, {**shape("WorkContext"), "session_id": "str", "agent_id": "str"})
        return found

    def who(self, path, work=None):
        """What who-has learns of a path here: the uncommitted changes and the committed ones, each path -> FileChange."""
        _, uncommitted, committed = (work or self.work()).changes_of(path, [self.top])[self.top]
        return tuple({change["path"]: change for change in changes} for changes in (uncommitted, committed))

    def changed(self):
        """What `git status` v1 calls changed: path (bytes) -> XY; of a rename both names."""
        found, parts = {}, iter(self.git("--no-optional-locks", "status", "--porcelain=v1", "-z", "-uall").split(b"\0"))
        for part in parts:
            if part:
                found[part[3:]] = part[:2].decode()
                if "R" in found[part[3:]] or "C" in found[part[3:]]:
                    found[next(parts)] = part[:2].decode()
        return found


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "repo")


@pytest.fixture
def feature(tmp_path):
    """A worktree on a branch `feature`, which has nothing yet that `main` lacks."""
    made = Tree(tmp_path / "repo")
    made.git("checkout", "-q", "-b", "feature")
    return made


def listed(facts):
    return {change["path"]: (change["status"], change["additions"], change["deletions"]) for change in facts["file_changes"]}


# ---- parsing

OID = b"1" * 40
LINE = b"1 %s N... 100644 100644 100644 " + OID + b" " + OID + b" %s"
UNMERGED = b"u %s N... 100644 100644 100644 100644 " + OID + b" " + OID + b" " + OID + b" %s"
RENAMED = b"2 %s N... 100644 100644 100644 " + OID + b" " + OID + b" %s %s"


@pytest.mark.parametrize("parts, expected", [
    ([], ("", "", [])),
    ([b"# branch.oid " + OID, b"# branch.head main"], ("1" * 40, "main", [])),
    ([b"# branch.oid (initial)", b"# branch.head topic/\xc3\xa9"], ("", "topic/é", [])),
    ([b"# branch.oid " + OID, b"# branch.head (detached)"], ("1" * 40, "", [])),
    ([b"# branch.oid " + b"a" * 64, b"# branch.head main", b"# branch.upstream origin/main", b"# branch.ab +1 -2", b"# stash 3"],
     ("a" * 64, "main", [])),
    ([LINE % (b".M", b"a b c")], ("", "", [(b"a b c", "modified", True, b"")])),
    ([LINE % (b"M.", b"  two  ")], ("", "", [(b"  two  ", "modified", True, b"")])),
    ([LINE % (b"A.", b'"q"\t\n\\')], ("", "", [(b'"q"\t\n\\', "added", True, b"")])),
    ([LINE % (b"AM", b"x")], ("", "", [(b"x", "added", True, b"")])),
    ([LINE % (b"AD", b"x")], ("", "", [(b"x", "deleted", True, b"")])),
    ([LINE % (b".A", b"intent to add")], ("", "", [(b"intent to add", "added", True, b"")])),
    ([LINE % (b"D.", b"x"), LINE % (b".D", b"y")], ("", "", [(b"x", "deleted", True, b""), (b"y", "deleted", True, b"")])),
    ([LINE % (b".T", b"now a link")], ("", "", [(b"now a link", "modified", True, b"")])),
    ([RENAMED % (b"R.", b"R100", b"new name"), b"old name"], ("", "", [(b"new name", "renamed", True, b"old name")])),
    ([RENAMED % (b"RM", b"R86", b"# branch.head no"), b"? no"], ("", "", [(b"# branch.head no", "renamed", True, b"? no")])),
    ([RENAMED % (b"RD", b"R86", b"new"), b"old"], ("", "", [(b"new", "deleted", True, b"old")])),
    ([RENAMED % (b"C.", b"C75", b"copy"), b"original"], ("", "", [(b"copy", "added", True, b"original")])),
    ([RENAMED % (b".R", b"R100", b"b"), b"a", b"? c"], ("", "", [(b"b", "renamed", True, b"a"), (b"c", "added", False, b"")])),
    *[([UNMERGED % (xy, b"both here")], ("", "", [(b"both here", "modified", True, b"")]))
      for xy in (b"UU", b"AA", b"DD", b"AU", b"UA", b"UD", b"DU")],
    ([b"? sp ace", b"? \xff\xfe", b"? \n", b"? ? ?"],
     ("", "", [(raw, "added", False, b"") for raw in (b"sp ace", b"\xff\xfe", b"\n", b"? ?")])),
    ([b"! ignored/", b"? seen"], ("", "", [(b"seen", "added", False, b"")])),
    ([b"1 .M S.M. 160000 160000 160000 " + OID + b" " + OID + b" sub"], ("", "", [(b"sub", "modified", True, b"")])),
])
def test_parse_status(parts, expected):
    state = thrum.parse_status(b"".join(part + b"\0" for part in parts))
    assert (state.head, state.branch, [(e.raw, e.status, e.tracked, e.before) for e in state.entries]) == expected


RAW_LINE = b":100644 100644 " + OID[:7] + b" " + OID[:7] + b" "


@pytest.mark.parametrize("parts, expected", [
    ([], {}),
    ([RAW_LINE + b"M", b"a", b"3\t4\ta"], {"a": ("modified", 3, 4, "")}),
    ([RAW_LINE + b"A", b"\tx\t", b"1\t0\t\tx\t"], {"\tx\t": ("added", 1, 0, "")}),
    ([RAW_LINE + b"D", b"new\nline", b"0\t9\tnew\nline"], {"new\nline": ("deleted", 0, 9, "")}),
    ([RAW_LINE + b"T", b"l", b"1\t1\tl"], {"l": ("modified", 1, 1, "")}),
    ([RAW_LINE + b"U", b"u", b"0\t0\tu"], {"u": ("modified", 0, 0, "")}),
    ([RAW_LINE + b"M", b"bin", b"-\t-\tbin"], {"bin": ("modified", 0, 0, "")}),
    ([RAW_LINE + b"R086", b"o ld", b"n\tew", b"2\t1\t", b"o ld", b"n\tew"], {"n\tew": ("renamed", 2, 1, "o ld")}),
    ([RAW_LINE + b"C075", b"o", b"n", b"2\t1\t", b"o", b"n"], {"n": ("added", 2, 1, "")}),
    ([RAW_LINE + b"R100", b":a", b":b", b"0\t0\t", b":a", b":b"], {":b": ("renamed", 0, 0, ":a")}),
    ([RAW_LINE + b"M", b"\xff", b"1\t2\t\xff"], {"\ufffd": ("modified", 1, 2, "")}),
    # a swap of two names, and a number in a name
    ([RAW_LINE + b"R100", b"a", b"b", RAW_LINE + b"R100", b"b", b"a", b"0\t1\t", b"a", b"b", b"2\t0\t", b"b", b"a"],
     {"b": ("renamed", 0, 1, "a"), "a": ("renamed", 2, 0, "b")}),
    ([RAW_LINE + b"M", b"1\t2\tx", b"5\t6\t1\t2\tx"], {"1\t2\tx": ("modified", 5, 6, "")}),
])
def test_parse_changes(parts, expected):
    assert thrum.parse_changes(b"".join(part + b"\0" for part in parts)) == expected


NAMES = ["a", "b c", "é", "e\u0301", "日本/語", "d/x", "d/y z", "d/e/f", '"quoted"', "it's", "tab\tin", "new\nline", "\nfirst", "cr\rin",
    "-flag",
         ":colon", "*", "[a]", "\\back", "\x01control", " lead", "trail ", "# branch.head x", "? x", "\udcff\udcfe", "1 .M x", "~", "%41"]


def text_of(rng):
    return "".join(f"{rng.randrange(30)}\n" for _ in range(rng.randrange(1, 12))) + rng.choice(["", "", "no end"])


def lines_of(data):
    """How many lines a text has, counted as git counts them."""
    return data.count(b"\n") + (data[-1:] not in (b"", b"\n"))


def stir(tree, rng, steps):
    """Do random things to the files of a worktree, committed, staged and not."""
    for _ in range(steps):
        there = sorted(os.fsdecode(raw) for raw in set(tree.git("ls-files", "-z", "-co", "--exclude-standard").split(b"\0"))
                       if raw and os.path.isfile(tree.file(os.fsdecode(raw))))
        name, other = rng.choice(there or NAMES), rng.choice(NAMES)
        free = not os.path.lexists(tree.file(other)) and not any(os.path.isfile(tree.file(str(p))) for p in Path(other).parents)
        act = rng.choice(["new", "new", "edit", "edit", "remove", "move", "mv", "add", "all", "rm", "commit", "binary", "unstage"])
        if act == "new" and free:
            tree.put(other, text_of(rng))
        elif act == "binary" and free:
            tree.put(other, "\0\1\2" + text_of(rng))
        elif act == "edit" and there:
            with open(tree.file(name), "ab") as file:
                file.write(text_of(rng).encode())
        elif act == "remove" and there:
            os.remove(tree.file(name))
        elif act == "move" and there and free:
            os.makedirs(os.path.dirname(tree.file(other)), exist_ok=True)
            os.rename(tree.file(name), tree.file(other))
        elif act == "mv" and there and free:
            os.makedirs(os.path.dirname(tree.file(other)), exist_ok=True)
            tree.git("mv", "--", name, other, check=False)
        elif act == "add" and there:
            tree.git("--literal-pathspecs", "add", "--", name)
        elif act == "rm" and there:
            tree.git("--literal-pathspecs", "rm", "-q", "--cached", "--", name, check=False)
        elif act == "unstage":
            tree.git("reset", "-q")
        elif act in ("all", "commit"):
            tree.git("add", "-A")
            if act == "commit":
                tree.git("commit", "-q", "--allow-empty", "-m", rng.choice(["x", "a subject\n\nand a body", "é"]))


@pytest.mark.parametrize("seed", range(40))
def test_a_random_repository_is_read_as_git_reads_it(tmp_path, seed):
    """Against `git status` v1, `git diff --name-status` and `--numstat`, `git log`, and lines counted here."""
    rng = random.Random(seed)
    tree = Tree(tmp_path / "repo")
    stir(tree, rng, 10)
    tree.git("checkout", "-q", "-b", "feature")
    stir(tree, rng, 14)
    facts, base = tree.facts(), tree.git("rev-parse", "main").decode().strip()
    show = thrum.path_text

    assert facts["branch"] == "feature" and facts["worktree_path"] == tree.top
    # commits
    commits = tree.git("rev-list", "main..feature").decode().split()
    assert [commit["sha"] for commit in facts["unmerged_commits"]] == commits
    for commit in facts["unmerged_commits"]:
        names = tree.git("diff-tree", "-r", "--no-commit-id", "--name-only", "-z", commit["sha"]).split(b"\0")[:-1]
        assert commit["files"] == [show(name) for name in names], f"seed {seed}"
        assert commit["message"] == tree.git("show", "-s", "--format=%s", commit["sha"]).decode().rstrip("\n")
    # what the branch has changed
    committed, parts = {}, iter(tree.git("diff", "--name-status", "-z", "-M", "main...feature").split(b"\0")[:-1])
    for letter in parts:
        old = next(parts)
        name = next(parts) if letter[:1] in b"RC" else old
        committed[show(name)] = thrum.STATUS_WORDS.get(chr(letter[0]), "modified")
    assert sorted(facts["changed_files"]) == sorted(committed)
    # what is not committed
    status, moved, forgotten, parts = [], set(), set(), iter(tree.git("status", "--porcelain=v1", "-z", "-uall").split(b"\0")[:-1])
    for part in parts:
        status.append(part[3:])
        if part[:1] == b"D":
            forgotten.add(part[3:])
        if b"R" in part[:2]:
            moved.add(next(parts))
    assert sorted(facts["uncommitted_files"]) == sorted({show(raw) for raw in status}), f"seed {seed}"
    changes = {change["path"]: change for change in facts["file_changes"]}
    assert set(changes) == {show(raw) for raw in status} | set(committed), f"seed {seed}"
    untracked = set(tree.git("ls-files", "-z", "-o", "--exclude-standard").split(b"\0")[:-1])
    for path, change in changes.items():
        raw = os.fsencode(path) if "\ufffd" not in path else b"\xff\xfe"
        old = change.get("renamed_from", path)
        old_raw = os.fsencode(old) if "\ufffd" not in old else b"\xff\xfe"
        before = tree.git("cat-file", "blob", base + ":" + os.fsdecode(old_raw), check=False)
        try:
            with open(tree.file(os.fsdecode(raw)), "rb") as file:
                after = file.read()
        except FileNotFoundError:
            after = b""
        if raw not in status:       # committed alone: the worktree is at the commit
            assert change["status"] == committed[path]
        if raw in moved:            # added on the branch, and renamed since: it stands there as it was committed
            continue
        if raw in forgotten:        # also where the file stays: the next commit deletes it
            assert change["status"] == "deleted", f"seed {seed}: {change}"
        elif b"\0" in before + after:
            assert (change["additions"], change["deletions"]) == (0, 0), f"seed {seed}: {change}"
        elif raw in untracked:
            assert (change["status"], change["additions"], change["deletions"]) == ("added", lines_of(after), 0), f"seed {seed}: {change}"
        else:
            assert change["additions"] - change["deletions"] == lines_of(after) - lines_of(before), f"seed {seed}: {change}"


# ---- who-has against git's own answer

MODES = {
    "plain": (), "version4": ("index.version=4",), "version2": ("index.version=2",), "no mode": ("core.fileMode=false",),
    "crlf": ("core.autocrlf=true",), "split": ("core.splitIndex=true",), "minimal": ("core.checkStat=minimal", "core.trustctime=false"),
    "untracked cache": ("core.untrackedCache=true",), "no symlinks": ("core.symlinks=false",), "sparse": ("index.sparse=true",),
}
PATHS = ["f", "g", "d/f", "d/g", "d/e/f", "ab\rc", "f\x0b", "n" * 130]


def disturb(tree, rng):
    """One thing after which a path may or may not be as it was."""
    path = rng.choice(PATHS)
    file, d = tree.file(path), tree.file("d")
    act = rng.choice(["edit", "same", "racy", "touch", "chmod", "link", "folder", "remove", "stage", "unstage", "intent", "skip", "assume",
                      "clear", "soft", "commit", "untrack", "refresh", "swap", "back", "dirlink", "dirback", "sparse", "hardlink", "copy",
                      "stash"])
    there = os.path.lexists(file) and not os.path.isdir(file)
    index = thrum.git_dirs(tree.top)[0] + "/index"
    if act in ("edit", "new"):
        if os.path.isdir(file):
            return
        try:
            if os.path.islink(file):
                os.unlink(file)
            tree.put(path, f"{rng.randrange(1000)}\n" * rng.randrange(1, 4))
        except OSError:             # a folder of its way is no folder now
            return
    elif act == "same" and there and not os.path.islink(file):       # the same size, and the same time to the nanosecond
        status = os.stat(file)
        with open(file, "r+b") as stream:
            stream.write(bytes(rng.choice(b"xyz") for _ in range(min(status.st_size, 2))))
        os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    elif act == "racy" and there and not os.path.islink(file):        # staged and edited within one tick of the clock
        tree.git("add", "--", path, check=False)
        with open(file, "r+b") as stream:
            stream.write(bytes(rng.choice(b"xyz") for _ in range(min(os.stat(file).st_size, 2))))
        os.utime(file, ns=(os.stat(index).st_mtime_ns,) * 2)
    elif act == "touch" and there and not os.path.islink(file):
        os.utime(file, ns=(rng.randrange(10**18, 2 * 10**18),) * 2)
    elif act == "chmod" and there and not os.path.islink(file):
        os.chmod(file, rng.choice([0o644, 0o755, 0o600, 0o744, 0o654]))
    elif act == "link" and there:
        os.unlink(file)
        os.symlink(rng.choice(["f", "g", "nowhere"]), file)
    elif act == "folder" and there:
        os.unlink(file)
        os.mkdir(file)
        tree.put(path + "/inner")
    elif act == "remove" and there:
        os.unlink(file)
    elif act in ("hardlink", "copy") and there and not os.path.islink(file):
        os.rename(file, file + b".old")
        (os.link if act == "hardlink" else shutil.copy2)(file + b".old", file)
        os.unlink(file + b".old")
    elif act == "swap":
        other = tree.file(rng.choice(PATHS))
        if there and os.path.isfile(other) and other != file:
            os.rename(file, file + b".old")
            os.rename(other, file)
            os.rename(file + b".old", other)
    elif act == "dirlink" and os.path.isdir(d) and not os.path.islink(d) and not os.path.exists(tree.file("moved")):
        os.rename(tree.file("d"), tree.file("moved"))
        os.symlink("moved", tree.file("d"))
    elif act == "dirback" and os.path.islink(tree.file("d")):
        os.unlink(tree.file("d"))
        os.rename(tree.file("moved"), tree.file("d"))
    elif act == "sparse":
        if rng.random() < 0.5:
            tree.git("sparse-checkout", "set", rng.choice(["d", "elsewhere"]), check=False)
        else:
            tree.git("sparse-checkout", "disable", check=False)
    elif act == "stage":
        tree.git("add", "--", path, check=False)
    elif act == "unstage":
        tree.git("reset", "-q", check=False)
    elif act == "intent":
        tree.git("add", "-N", "--", path, check=False)
    elif act == "skip":
        tree.git("update-index", "--skip-worktree", "--", path, check=False)
    elif act == "assume":
        tree.git("update-index", "--assume-unchanged", "--", path, check=False)
    elif act == "clear":
        tree.git("update-index", "--no-skip-worktree", "--no-assume-unchanged", "--", path, check=False)
    elif act == "soft":
        tree.git("reset", "-q", "--soft", "HEAD~1", check=False)
    elif act == "commit":
        tree.git("commit", "-q", "--allow-empty", "-am", "more", check=False)
    elif act == "untrack":
        tree.git("rm", "-q", "--cached", "--", path, check=False)
    elif act == "refresh":
        tree.git("update-index", "-q", "--refresh", check=False)
    elif act == "back":
        tree.git("checkout", "-q", "--", path, check=False)
    elif act == "stash":
        tree.git("stash", "-q", "-u", check=False)
    return act, path


def committed_blobs(tree):
    """What the commit holds: path (bytes) -> mode and id, as the index has them."""
    found = {}
    for line in tree.git("ls-tree", "-r", "-z", "HEAD", check=False).split(b"\0")[:-1]:
        about, path = line.split(b"\t", 1)
        mode, _, name = about.decode().split()
        found[path] = int(mode, 8).to_bytes(4, "big") + bytes.fromhex(name)
    return found


@pytest.mark.parametrize("mode, ids", [*((mode, "sha1") for mode in MODES), *((mode, "sha256") for mode in ("plain", "version4", "split"))])
def test_nothing_is_called_untouched_that_git_calls_changed(tmp_path, mode, ids):
    """Hundreds of histories of edits; and the quick look is of use: it knows of the untouched ones that they are."""
    said = asked = 0
    for seed in range(8):
        rng = random.Random(f"{mode} {ids} {seed}")
        tree = Tree(tmp_path / str(seed), f"--object-format={ids}")
        for setting in MODES[mode]:
            tree.git("config", *setting.split("="))
        tree.commit(*PATHS, "other", data="one\ntwo\n")
        for path in PATHS:          # older than the index, so that what is untouched can be known
            os.utime(tree.file(path), (1e9, 1e9))
        tree.git("update-index", "-q", "--refresh")
        acts = []
        for _ in range(12):
            acts.append(disturb(tree, rng))
            blobs, changed = committed_blobs(tree), tree.changed()
            for path in [*PATHS, "nothing", "moved/f", "f/inner"]:
                raw = path.encode()
                asked += raw not in changed
                if thrum._is_untouched(tree.top, path, blobs.get(raw, b"")):
                    said += 1
                    assert raw not in changed, f"{mode} {seed}: {path!r} is {changed[raw]!r} after {acts}"
        shutil.rmtree(tree.path)
    if mode not in ("version4", "split"):
        assert said > asked / 4


@pytest.mark.parametrize("seed", range(12))
def test_who_has_agrees_with_git_in_each_worktree(tmp_path, seed):
    """Three worktrees with random work, and each path that any of them knows: who has changed it, committed or not?"""
    rng = random.Random(seed)
    main = Tree(tmp_path / "repo")
    stir(main, rng, 8)
    main.commit("f", "g")
    trees = [main, main.worktree("one"), main.worktree("two")]
    for tree in trees[1:]:
        stir(tree, rng, rng.randrange(12))
    work = main.work()
    known = {raw for tree in trees for raw in tree.git("ls-files", "-z", "-co", "--exclude-standard").split(b"\0") if raw}
    known |= {raw for tree in trees for raw in tree.changed()} | {b"nothing", b"g", b"f"}
    for raw in known:
        try:
            path = raw.decode()
        except ValueError:
            continue
        answers = work.changes_of(path, [tree.top for tree in trees])
        for tree in trees:
            state, uncommitted, committed = answers[tree.top]
            assert state.head == tree.git("rev-parse", "HEAD").decode().strip()
            assert state.branch == tree.git("branch", "--show-current").decode().strip()
            touched = {change["path"] for change in uncommitted} | {change.get("renamed_from") for change in uncommitted}
            assert (raw in tree.changed()) == bool(uncommitted), f"seed {seed}: {path!r} in {tree.top}: {uncommitted}, {tree.changed()}"
            if uncommitted:
                assert path in touched or tree.changed()[raw][0] == "R"
            names = tree.git("diff", "--name-only", "--no-renames", "-z", "main...HEAD").split(b"\0")
            if not uncommitted:
                assert (raw in names) == bool(committed), f"seed {seed}: {path!r} in {tree.top}: {committed}"


# ---- odd repositories, through the commands

def put_names(tree, names, data="one\n"):
    for name in names:
        tree.put(name, data)


ODD = [name for name in NAMES if "\udcff" not in name]


def renamed(tree):
    """Renames of every kind: committed, committed and then edited, staged, staged and then edited, and in the worktree alone."""
    lines = "".join(f"line {n}\n" for n in range(20))
    for n, name in enumerate(("c", "ce", "s", "se", "w")):
        tree.put("old " + name, lines + str(n) * 30 + "\n")
    tree.commit("untouched")
    tree.git("checkout", "-q", "-b", "feature")
    for name in ("c", "ce"):
        tree.git("mv", "old " + name, "new " + name)
    tree.git("commit", "-q", "-m", "rename")
    for name in ("s", "se"):
        tree.git("mv", "old " + name, "new " + name)
    os.rename(tree.file("old w"), tree.file("new w"))
    for name in ("ce", "se"):
        with open(tree.file("new " + name), "a") as file:
            file.write("more\n")
    return tree, {
        "branch": "feature", "commits": 1, "changed": {"new c", "new ce"},
        "uncommitted": {"new ce", "new s", "new se", "old w", "new w"},
        "changes": {"new c": ("renamed", 0, 0), "new ce": ("renamed", 1, 0), "new s": ("renamed", 0, 0), "new se": ("renamed", 1, 0),
                    "old w": ("deleted", 0, 21), "new w": ("added", 21, 0)},
        "touched": ["old c", "old ce", "old s", "old se"], "untouched": ["untouched"]}


def deleted(tree):
    tree.commit("committed", "staged", "gone", "kept", "d/a", "d/b", "untouched")
    tree.git("checkout", "-q", "-b", "feature")
    tree.git("rm", "-q", "committed")
    tree.git("commit", "-q", "-m", "delete")
    tree.git("rm", "-q", "staged")
    os.remove(tree.file("gone"))
    tree.git("rm", "-q", "--cached", "kept")
    shutil.rmtree(tree.file("d"))
    return tree, {"branch": "feature", "commits": 1, "changed": {"committed"}, "uncommitted": {"staged", "gone", "kept", "d/a", "d/b"},
                  "changes": dict.fromkeys(("committed", "staged", "gone", "d/a", "d/b"), ("deleted", 0, 2)),
                  "touched": ["kept", "d"], "untouched": ["untouched"]}


def named_oddly(tree):
    """Names of every kind: committed, edited, and new."""
    tree.commit("untouched")
    tree.git("checkout", "-q", "-b", "feature")
    for name in ODD[::3]:
        tree.put(name)
    tree.commit(message="odd")
    put_names(tree, ODD[1::3])
    tree.git("add", "-A")
    put_names(tree, ODD[2::3])
    return tree, {"branch": "feature", "commits": 1, "changed": set(ODD[::3]), "uncommitted": {*ODD[1::3], *ODD[2::3]},
                  "changes": {name: ("added", 1 if n % 3 else 2, 0) for n, name in enumerate(ODD)}, "untouched": ["untouched"]}


def detached(tree):
    tree.commit("a")
    tree.git("checkout", "-q", "--detach")
    tree.commit("b")
    tree.put("a", "changed\n")
    return tree, {"branch": None, "commits": 1, "changed": {"b"}, "uncommitted": {"a"},
                  "changes": {"b": ("added", 2, 0), "a": ("modified", 1, 2)}, "untouched": ["no such file"]}


def unborn(folder):
    tree = Tree(folder / "repo", commit=False)
    put_names(tree, ["staged", "d/new"])
    tree.git("add", "staged")
    return tree, {"branch": "main", "commits": 0, "changed": set(), "uncommitted": {"staged", "d/new"},
                  "changes": {"d/new": ("added", 1, 0)}, "untouched": ["nothing"]}


def shallow(folder):
    tree = Tree(folder / "origin")
    for n in range(5):
        tree.commit("f", data=f"{n}\n")
    tree.git("branch", "topic")
    tree.git("checkout", "-q", "topic")
    tree.commit("topic")
    tree.git("checkout", "-q", "main")
    subprocess.run(["git", "clone", "-q", "--depth=1", "--no-single-branch", f"file://{tree.top}", str(folder / "clone")], env=CLEAN,
        check=True)
    clone = Tree(folder / "clone")
    clone.git("checkout", "-q", "-b", "mine", "origin/main")
    clone.commit("mine")
    clone.put("f", "edited\n")
    return clone, {"branch": "mine", "commits": 1, "changed": {"mine"}, "uncommitted": {"f"},
                   "changes": {"mine": ("added", 2, 0), "f": ("modified", 1, 1)}, "untouched": ["topic"]}


def on_a_feature(tree):
    """Two files on the base; on a branch of its own another one, committed, and an edit."""
    tree.commit("a", "untouched")
    tree.git("checkout", "-q", "-b", "feature")
    tree.commit("b")
    tree.put("a", "x\n")
    return tree, {"branch": "feature", "commits": 1, "changed": {"b"}, "uncommitted": {"a"},
                  "changes": {"b": ("added", 2, 0), "a": ("modified", 1, 2)}, "untouched": ["untouched"]}


def based_on(name):
    def build(folder):
        tree = Tree(folder / "repo", commit=False)
        tree.git("symbolic-ref", "HEAD", "refs/heads/" + name)
        return on_a_feature(tree)
    return build


def origin_head_alone(folder):
    """Only origin/HEAD says what the base is: origin/develop."""
    origin = Tree(folder / "origin", commit=False)
    origin.git("symbolic-ref", "HEAD", "refs/heads/develop")
    origin.commit("a", "untouched")
    subprocess.run(["git", "clone", "-q", origin.top, str(folder / "clone")], env=CLEAN, check=True)
    tree = Tree(folder / "clone")
    tree.git("checkout", "-q", "-b", "feature")
    tree.git("branch", "-D", "develop")
    tree.commit("b")
    return tree, {"branch": "feature", "commits": 1, "changed": {"b"}, "uncommitted": set(), "changes": {"b": ("added", 2, 0)},
                  "untouched": ["untouched", "a"]}


def no_base(folder):
    """No branch of a known name: the main worktree is compared with the first commit, a linked one with the main one's branch."""
    tree = Tree(folder / "repo", commit=False)
    tree.git("symbolic-ref", "HEAD", "refs/heads/odd")
    tree.commit("a")
    tree.commit("b")
    return tree, {"branch": "odd", "commits": 1, "changed": {"b"}, "uncommitted": set(), "changes": {"b": ("added", 2, 0)},
                  "untouched": ["a"]}


def no_base_linked(folder):
    main, _ = no_base(folder)
    tree = main.worktree("linked")
    tree.commit("c")
    return tree, {"branch": "linked", "commits": 1, "changed": {"c"}, "uncommitted": set(), "changes": {"c": ("added", 2, 0)},
                  "untouched": ["a"], "main": main.top}


def merging(tree):
    tree.commit("f", "untouched")
    tree.git("checkout", "-q", "-b", "feature")
    tree.commit("f", data="ours\n")
    tree.git("checkout", "-q", "main")
    tree.commit("f", "theirs", data="theirs\n")
    tree.git("checkout", "-q", "feature")
    tree.git("merge", "-q", "main", check=False)
    return tree, {"branch": "feature", "commits": 1, "changed": {"f"}, "uncommitted": {"f", "theirs"},
                  "changes": {}, "untouched": ["untouched"]}


def rebasing(tree):
    merging(tree)
    tree.git("merge", "--abort")
    tree.git("rebase", "-q", "main", check=False)
    return tree, {"branch": None, "commits": 0, "changed": set(), "uncommitted": {"f"}, "changes": {}, "untouched": ["untouched", "theirs"]}


def sparse(tree):
    tree.commit("in/a", "in/b", "out/a", "top")
    tree.git("checkout", "-q", "-b", "feature")
    tree.git("sparse-checkout", "set", "--cone", "--sparse-index", "in")
    tree.put("in/a", "x\n")
    return tree, {"branch": "feature", "commits": 0, "changed": set(), "uncommitted": {"in/a"}, "changes": {"in/a": ("modified", 1, 2)},
                  "untouched": ["out/a", "in/b", "top", "out"]}


def with_submodule(folder):
    inner = Tree(folder / "inner")
    inner.commit("in", "deep/in")
    tree = Tree(folder / "repo")
    for name in ("clean", "dirty", "moved"):
        tree.git("submodule", "-q", "add", inner.top, name)
    tree.commit("untouched")
    tree.git("checkout", "-q", "-b", "feature")
    Tree(tree.path / "dirty").put("in", "edited\n")
    Tree(tree.path / "moved").commit("more")
    return tree, {"branch": "feature", "commits": 0, "changed": set(), "uncommitted": {"moved"},
                  "changes": {"moved": ("modified", 1, 1)}, "untouched": ["clean", "untouched", "clean/in", "dirty", "dirty/in"]}


def through_a_link(folder):
    tree = Tree(folder / "real" / "repo")
    tree.commit("a", "d/b")
    os.symlink(folder / "real", folder / "link")
    linked = Tree(folder / "link" / "repo")
    linked.put("a", "x\n")
    return linked, {"branch": "main", "commits": 0, "changed": set(), "uncommitted": {"a"}, "changes": {"a": ("modified", 1, 2)},
                    "untouched": ["d/b"], "path": os.path.realpath(linked.top)}


def inside_another(folder):
    """A linked worktree in a folder of the main one."""
    main = Tree(folder / "repo")
    main.commit("a", "untouched")
    main.git("worktree", "add", "-q", "-b", "feature", main.top + "/trees/one")
    tree = Tree(main.path / "trees" / "one")
    tree.put("a", "x\n")
    return tree, {"branch": "feature", "commits": 0, "changed": set(), "uncommitted": {"a"}, "changes": {"a": ("modified", 1, 2)},
                  "untouched": ["untouched"], "main": main.top}


def with_separate_git_dir(folder):
    tree = Tree(folder / "repo", f"--separate-git-dir={folder}/elsewhere.git")
    tree.commit("a", "untouched")
    tree.put("a", "x\n")
    return tree, {"branch": "main", "commits": 0, "changed": set(), "uncommitted": {"a"}, "changes": {"a": ("modified", 1, 2)},
                  "untouched": ["untouched"]}


def unusual_files(tree):
    """A link, a mode, a binary file, an ignored one, an empty one, a FIFO, and a file that became a folder."""
    tree.commit("mode", "becomes", "untouched", ".gitignore", data="ignored\n.thrum\n")
    tree.put("binary", "\0" * 10)
    tree.git("add", "-A")
    tree.git("commit", "-q", "-m", "binary")
    tree.git("checkout", "-q", "-b", "feature")
    os.chmod(tree.file("mode"), 0o755)
    os.symlink("nowhere", tree.file("link"))
    tree.put("binary", "\0" * 11)
    tree.put("ignored")
    tree.put("empty", "")
    os.mkfifo(tree.file("fifo"))
    os.remove(tree.file("becomes"))
    tree.put("becomes/inner", "x\n")
    return tree, {"branch": "feature", "commits": 0, "changed": set(), "uncommitted": {"mode", "link", "binary", "empty", "becomes",
        "becomes/inner"},
                  "changes": {"mode": ("modified", 0, 0), "binary": ("modified", 0, 0), "empty": ("added", 0, 0),
                              "becomes": ("deleted", 0, 2), "becomes/inner": ("added", 1, 0)},
                  "untouched": ["ignored", "untouched", "fifo"]}


def in_sha256(folder):
    return on_a_feature(Tree(folder / "repo", "--object-format=sha256"))


TREES = {build.__name__: lambda folder, build=build: build(Tree(folder / "repo"))
         for build in (renamed, deleted, named_oddly, detached, merging, rebasing, sparse, unusual_files)}
TREES.update({build.__name__: build for build in (unborn, shallow, origin_head_alone, no_base, no_base_linked, with_submodule,
    through_a_link,
                                                  inside_another, with_separate_git_dir, in_sha256)})
TREES.update({"based_on_" + name: based_on(name) for name in ("main", "master", "trunk")})


@pytest.mark.parametrize("kind", TREES)
def test_odd_repositories(tmp_path, kind):
    """heartbeat, agent context, team, overview, status and who-has tell the truth, and all the same."""
    tree, wanted = TREES[kind](tmp_path)
    repo, main = Repo(tree.top), Repo(wanted.get("main", tree.top))
    try:
        if main.path != repo.path:
            main.ok("init")
        repo.join("ada")
        with open(thrum.git_dirs(tree.top)[1] + "/info/exclude", "a") as file:     # what `quickstart` itself writes is not the work
            file.write("/.gitignore\n")
        beat = repo.json("session", "heartbeat")
        context, = repo.json("agent", "context", "ada")["contexts"]
        member, = repo.json("team")["members"]
        at = {"git_updated_at": context["git_updated_at"]}
        assert [{**repo.json(view)["work_context"], **at} for view in ("overview", "status")] == [context] * 2
        assert beat["file_changes"] == context.get("file_changes", []) == member["file_changes"]
        assert beat.get("branch") == context.get("branch") == member.get("branch") == wanted["branch"]
        assert beat["unmerged_commits"] == member["unmerged_commits"] == len(context.get("unmerged_commits", ())) == wanted["commits"]
        assert context["worktree_path"] == wanted.get("path", tree.top)
        changed, uncommitted = context.get("changed_files", []), context.get("uncommitted_files", [])
        assert set(changed) == wanted["changed"] and set(uncommitted) - {".gitignore"} == wanted["uncommitted"]
        assert len(uncommitted) == len(set(uncommitted)) and uncommitted == member["uncommitted_files"]
        found = listed(member)
        assert {path: found.get(path) for path in wanted["changes"]} == wanted["changes"]
        assert set(found) - {".gitignore"} == wanted["uncommitted"] | wanted["changed"]
        paths = [*sorted(wanted["changed"] | wanted["uncommitted"]), *wanted.get("touched", ())]
        with contextlib.closing(repo.client()) as client:
            for path in paths:
                has = client.call("work.whoHas", file=path)
                assert [(work["agent_id"], work["live"]) for work in has["contexts"]] == [("ada", True)], path
                if path in found:
                    assert listed(has["contexts"][0])[path] == found[path]
                    assert (path in has["contexts"][0]["uncommitted_files"]) == (path in wanted["uncommitted"]), path
                assert has["contexts"][0]["file_changes"], path
            for path in wanted["untouched"]:
                assert client.call("work.whoHas", file=path)["contexts"] == [], path
        assert [work["agent_id"] for work in repo.json("who-has", paths[-1])["contexts"]] == ["ada"]
        assert repo.ok("who-has", path) == f"No agents are currently editing {path}\n"
    finally:
        main.close()


# ---- what is never done

def plant(folder, mark, *more):
    """An executable that leaves a mark when it is run."""
    path = Path(folder) / f"planted{len(os.listdir(folder))}"
    path.write_text("#!/bin/sh\n" + "".join(line + "\n" for line in (f"echo \"$0 $*\" >> {mark}", *more)))
    path.chmod(0o755)
    return str(path)


def sign(tree):
    """Replace the last commit by one that carries a signature, which is none."""
    head, body = tree.git("cat-file", "commit", "HEAD").split(b"\n\n", 1)
    signed = head + b"\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n xx\n -----END PGP SIGNATURE-----\n\n" + body
    tree.git("reset", "-q", tree.git("hash-object", "-t", "commit", "-w", "--stdin", input=signed).decode().strip())


SETTINGS_THAT_RUN = {
    "core.fsmonitor": ["status"], "diff.external": ["diff"], "diff.planted.textconv": ["diff"], "diff.planted.command": ["diff"],
    "gpg.program": ["log", "-1"], "core.pager": ["-p", "log", "-1"], "core.sshCommand": None, "core.editor": None, "core.askPass": None,
    "pager.status": ["-p", "status"], "pager.diff": None, "pager.log": None, "credential.helper": None, "alias.status": None,
    "core.alternateRefsCommand": None, "interactive.diffFilter": None, "trailer.x.command": None, "uploadpack.packObjectsHook": None,
}


@pytest.mark.parametrize("setting", [*SETTINGS_THAT_RUN, "hooks", "core.hooksPath", "submodule"])
def test_nothing_that_a_repository_names_is_run(feature, tmp_path, setting):
    """Hooks, monitors, filters of the output, signature checks: none, in the repository or in a submodule of it."""
    tree, mark = feature, tmp_path / "mark"
    (tmp_path / "planted").mkdir()
    script, control, setter = plant(tmp_path / "planted", mark, "exit 1"), None, tree
    tree.put(".gitattributes", "* diff=planted\n")
    tree.commit("a", "b")
    tree.git("config", "log.showSignature", "true")
    if setting == "gpg.program":
        sign(tree)
    if setting in ("hooks", "core.hooksPath"):
        folder = tree.path / ".git" / "hooks"
        if setting == "core.hooksPath":
            folder = tmp_path / "elsewhere"
            folder.mkdir()
            tree.git("config", "core.hooksPath", str(folder))
        for hook in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "pre-auto-gc", "post-checkout"):
            shutil.copy(script, folder / hook)
        control = ["update-index", "--refresh"]
        os.utime(tree.file("b"), (1e9, 1e9))
    elif setting == "submodule":
        inner = Tree(tmp_path / "inner")
        inner.commit("in")
        tree.git("submodule", "-q", "add", inner.top, "sub")
        tree.git("commit", "-q", "-m", "sub")
        setter, control = Tree(tree.path / "sub"), ["status"]
        setter.git("config", "core.fsmonitor", script)
    else:
        tree.git("config", setting, "!" + script if setting.startswith("alias") else script)
        control = SETTINGS_THAT_RUN[setting]
    tree.put("a", "changed\n")
    mark.unlink(missing_ok=True)
    work = tree.work()
    assert {"a", "b"} <= set(listed(tree.facts(work))) and set(tree.who("a", work)[0]) == {"a"}
    assert tree.who("", work)[0] and not tree.who("nothing", work)[0]
    assert not mark.exists(), mark.read_text()
    if control:                     # the plant is a live one
        subprocess.run(["git", *control], cwd=setter.top, env={**CLEAN, "GIT_PAGER_IN_USE": "0"}, capture_output=True)
        if setting not in ("core.pager", "pager.status"):       # which run on a terminal alone
            assert mark.exists(), setting


def test_the_locks_and_the_index_are_left_alone(feature):
    """Somebody holds index.lock, and every file has another time than the index remembers: still nothing is written."""
    tree = feature
    tree.commit("a", "b", "c")
    tree.put("a", "changed\n")
    for name in ("b", "c"):
        os.utime(tree.file(name), (1e9, 1e9))       # `git status` would like to refresh these
    folder = tree.path / ".git"
    for lock in ("index.lock", "HEAD.lock", "config.lock"):
        (folder / lock).write_text("")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns,
        path.stat().st_ino) for path in sorted(folder.rglob("*")) if path.is_file()}
    work = tree.work()
    assert tree.facts(work)["uncommitted_files"] == ["a"] and list(tree.who("b", work)[1]) == ["b"] \
        and list(tree.who("a", work)[0]) == ["a"]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns,
        path.stat().st_ino) for path in sorted(folder.rglob("*")) if path.is_file()} \
        == before
    for lock in ("index.lock", "HEAD.lock", "config.lock"):
        (folder / lock).unlink()
    tree.git("status")
    assert (folder / "index").stat().st_mtime_ns != before[folder / "index"][1], "git's own status does refresh"


def test_the_environment_does_not_matter(feature, tmp_path, monkeypatch):
    tree, other = feature, Tree(tmp_path / "other")
    tree.commit("a")
    tree.put("a", "changed\n")
    other.commit("x")
    before = tree.facts()
    mark = tmp_path / "mark"
    (tmp_path / "planted").mkdir()
    for name, value in {
            "GIT_DIR": other.top + "/.git", "GIT_WORK_TREE": other.top, "GIT_INDEX_FILE": "/nowhere/index",
            "GIT_OBJECT_DIRECTORY": "/nowhere",
            "GIT_COMMON_DIR": other.top + "/.git", "GIT_NAMESPACE": "n", "GIT_CEILING_DIRECTORIES": str(tmp_path), "GIT_EXTERNAL_DIFF":
            plant(tmp_path / "planted", mark), "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.bare", "GIT_CONFIG_VALUE_0": "true",
            "GIT_CONFIG_PARAMETERS": "'core.bare=true'", "GIT_PREFIX": "x/", "GIT_TRACE": "1", "GIT_LITERAL_PATHSPECS": "0",
            "GIT_DIFF_OPTS": "-u9",
            "GIT_ICASE_PATHSPECS": "1", "GIT_OPTIONAL_LOCKS": "1", "GIT_PAGER": plant(tmp_path / "planted", mark), "LC_ALL": "de_DE.UTF-8",
            "LANGUAGE": "de", "GIT_REDIRECT_STDOUT": str(mark), "GIT_REPLACE_REF_BASE": "refs/x", "GIT_SHALLOW_FILE": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    facts = tree.work().facts(tree.top)
    assert {**facts, "git_updated_at": ""} == {**before, "git_updated_at": ""} and not mark.exists()


def test_large_work_is_bounded(feature):
    """3,000 new files, 20,000 changed lines, 250 commits, a commit of 300 files, and a subject of 100,000 characters."""
    tree = feature
    tree.commit("long", data="x\n" * 20_000)
    tree.commit(*(f"many/{n}" for n in range(300)), message="s" * 100_000)
    tree.git("update-ref", "refs/heads/feature", many_commits(tree, 250))
    tree.git("reset", "-q", "--mixed")
    tree.put("long", "y\n" * 20_000)
    for n in range(3_000):
        tree.put(f"new/{n}")
    began = time.monotonic()
    facts = tree.facts()
    assert time.monotonic() - began < 20
    for field in ("uncommitted_files", "changed_files", "file_changes"):
        assert len(facts[field]) <= thrum.WORK_FILES
    assert len(facts["unmerged_commits"]) == thrum.WORK_COMMITS
    assert all(len(commit["files"]) <= thrum.COMMIT_FILES for commit in facts["unmerged_commits"])
    assert len(thrum.canonical(facts)) < 400_000
    state = tree.work().state(tree.top)
    assert len(state.entries) == 3_001
    assert tree.who("long")[0]["long"]["additions"] == 20_000


def many_commits(tree, count):
    """Make empty commits at once; the name of the last."""
    head = tree.git("rev-parse", "HEAD").decode().strip()
    commits = [f"commit refs/heads/fast\ncommitter T <t@l> {1_700_000_000 + n} +0000\ndata 4\nfast\n" for n in range(count)]
    stream = commits[0] + f"from {head}\n" + "".join(commits[1:])
    tree.git("fast-import", "--quiet", input=stream.encode())
    return tree.git("rev-parse", "fast").decode().strip()


# ---- what the first look has found

def test_a_file_name_forges_no_commit(feature):
    forged = "\x01" + "a" * 40 + "\x021\x02evil"
    feature.commit("\x01!", forged, "\nlead")
    facts = feature.facts()
    assert [sorted(commit["files"]) for commit in facts["unmerged_commits"]] == [sorted(["\x01!", forged, "\nlead"])]
    feature.commit("\nfirst")
    assert feature.facts()["unmerged_commits"][0]["files"] == ["\nfirst"]


@pytest.mark.parametrize("date", ["@999999999999999999 +0000", "@99999999999999 +0000", "@0 +0000", "@253402300800 +0000"])
def test_absurd_dates(feature, date):
    feature.commit("x", GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
    assert listed(feature.facts()) == {"x": ("added", 2, 0)} and set(feature.who("x")[1]) == {"x"}


@pytest.mark.parametrize("seconds", [-10**9, 0, 10**10, 2**33])
def test_absurd_file_times(feature, seconds):
    feature.put("x")
    os.utime(feature.file("x"), (seconds, seconds))
    assert listed(feature.facts()) == {"x": ("added", 2, 0)}


def test_a_file_that_git_was_told_to_forget_is_listed_once(feature):
    feature.commit("f")
    feature.git("rm", "-q", "--cached", "f")
    assert feature.facts()["uncommitted_files"] == ["f"] and list(feature.who("f")[0]) == ["f"]


@pytest.mark.parametrize("name", ["a\rb", "a\x0bb", "a\x0cb", "a\x1cb", "a\x85b", "a\u2028b"])
def test_names_that_hold_other_line_ends(tree, name):
    """Staged deletions in worktrees at many commits: the answers of git are not mistaken for one another."""
    trees = [tree, *(tree.worktree(f"w{n}") for n in range(4))]
    for n, other in enumerate(trees[1:]):
        other.commit(name, f"only{n}")
        other.git("rm", "-q", name)
    answers = tree.work().changes_of(name, [other.top for other in trees])
    assert [[change["status"] for change in answers[other.top][1]] for other in trees] == [[], *[["deleted"]] * 4]


def test_a_branch_with_brackets(tree):
    for name in ("x(detached)", "(initial)"):       # of "(detached)" git says no more than of a head that is
        tree.git("checkout", "-q", "-b", name)
        assert tree.facts()["branch"] == name


def test_a_folder_that_became_a_link(tree):
    tree.commit("d/f")
    os.utime(tree.file("d/f"), (1e9, 1e9))
    tree.git("status")
    os.rename(tree.file("d"), tree.file("e"))
    os.symlink("e", tree.file("d"))
    assert list(tree.who("d/f")[0]) == ["d/f"]


def test_renames_that_only_status_sees(tree):
    """The base has two files of the same content: the one that git says was renamed counts."""
    tree.commit("f", "g")
    tree.git("mv", "g", "h")
    os.remove(tree.file("f"))
    assert tree.who("g")[0] and tree.who("h")[0] and tree.who("f")[0]
    tree.git("reset", "-q", "--hard")
    tree.git("checkout", "-q", "-b", "feature")
    tree.commit("added", data="".join(f"{n}\n" for n in range(9)))
    tree.git("mv", "added", "moved")
    assert list(tree.who("added")[0]) == ["moved"]


def test_a_file_in_a_submodule(tree, tmp_path):
    inner = Tree(tmp_path / "inner")
    inner.commit("in")
    tree.git("submodule", "-q", "add", inner.top, "sub")
    tree.git("commit", "-q", "-m", "sub")
    assert not tree.who("sub/in")[0] and not tree.who("sub")[0]
    # What is not committed in it is another repository's: git would look there by that one's settings, and run what they name.
    (inside := Tree(tree.path / "sub")).put("in", "edited\n")
    inside.git("config", "filter.e.clean", f"touch {tmp_path}/ran; cat")
    inside.put(".gitattributes", "* filter=e\n")
    assert not tree.who("sub")[0] and not tree.who("sub/in")[0] and not tree.facts()["uncommitted_files"]
    assert not (tmp_path / "ran").exists()
    inside.commit("more")
    assert list(tree.who("sub")[0]) == ["sub"] == list(tree.who("sub/in")[0])


def test_subjects_in_other_encodings(feature):
    feature.git("config", "i18n.logOutputEncoding", "latin1")
    feature.commit("x", message="é")
    assert feature.facts()["unmerged_commits"][0]["message"] == "é"


SETTINGS = ["status.renames=false", "status.renames=copies", "diff.renames=copies", "diff.renames=false", "diff.relative=true",
    "diff.noprefix=true",
            "log.follow=true", "log.decorate=full", "log.diffMerges=on", "format.pretty=oneline", "status.showStash=true",
            "status.showUntrackedFiles=no", "core.quotePath=true", "color.ui=always", "column.ui=always", "diff.algorithm=histogram",
            "diff.submodule=log", "diff.ignoreSubmodules=all", "core.abbrev=4", "log.date=raw", "core.untrackedCache=true",
            "index.sparse=true",
            "diff.wsErrorHighlight=all", "diff.colorMoved=zebra", "status.branch=false", "status.short=true", "log.showRoot=false",
            "core.attributesFile=/nowhere", "diff.mnemonicPrefix=true", "log.mailmap=true", "status.aheadBehind=true",
            "advice.statusHints=true"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_the_user_changes_what_is_read(feature, setting):
    tree = feature
    tree.commit("b", "é", "gone")
    tree.commit("c", data="".join(f"{n}\n" for n in range(9)))
    tree.git("branch", "-f", "main")
    tree.commit("a")
    tree.git("mv", "c", "d")
    tree.put("b", "one\ntwo\nthree\n")
    tree.put("new", "x\n")
    tree.git("rm", "-q", "gone")
    before = tree.facts()
    tree.git("config", *setting.split("="))
    after = tree.facts()
    if "renames=false" in setting:          # then git itself sees two changes
        assert set(after["uncommitted_files"]) >= {"b", "d", "gone", "new"}
    else:
        assert {**after, "git_updated_at": ""} == {**before, "git_updated_at": ""}
    assert tree.who("c")[0] and tree.who("d")[0]


# ---- sessions: what is kept, shared, and looked at

class Office(Methods):
    """The methods on a ledger in a real repository, called as the daemon calls them, `prepare` included."""

    def __init__(self, path):
        self.tree, world = Tree(path), FakeWorld()
        Office.count = getattr(Office, "count", 0) + 1
        world.drawn = Office.count << 40        # other numbers than those of other machines
        super().__init__(self.tree.path, world)
        self.world.at = time.time_ns()
        self.tree.put(".git/info/exclude", ".thrum\n")

    def call(self, method, **params):
        self.world.at += thrum.NS
        row = thrum.METHODS[method]
        if not row.prepare:
            return super().call(method, **params)
        checked = thrum.check_params(row, params)
        prepared = self.reading.within(10, lambda: row.prepare(thrum.Context(self.world, self.reading, self.ledger), checked))

        def change(context):
            context.prepared = prepared
            return row.handler(context, checked)
        (outcome,), self.events = self.ledger.commit([change])
        if isinstance(outcome, Exception):
            raise outcome
        return json.loads(json.dumps(outcome))

    def at_work(self, name, tree=None, **more):
        """Register an agent and start its session in a worktree; the session's id."""
        self.call("agent.register", name=name, role="r_" + name, module="core", force=True)
        ref = {"type": "worktree", "value": thrum.worktree_label((tree or self.tree).top)}
        return self.call("session.start", agent_id=name, refs=[ref], **more)["session_id"]

    def context(self, name):
        found = self.call("agent.listContext", agent_id=name)["contexts"]
        return found[0] if found else None

    def who(self, path):
        found = self.call("work.whoHas", file=path)
        shaped(found, "Holders")
        return found

    def again(self, days=0):
        """Stop, let time pass, start."""
        self.close()
        self.world.at += int(days * 86_400) * thrum.NS
        self.open()

    def take_over(self, other):
        """Begin anew, with what another machine has put on the branch."""
        self.close()
        shutil.rmtree(self.places.var)
        shutil.rmtree(self.places.sync)
        shutil.copytree(other.places.sync, self.places.sync)
        self.world.at = other.world.at
        self.open()

    def rebuilt(self):
        """Make the database anew from the journal."""
        self.close()
        for path in Path(self.places.var).glob("*.db*"):
            path.unlink()
        self.open()


@pytest.fixture
def office(tmp_path):
    made = Office(tmp_path / "repo")
    yield made
    made.close()


def pairs(*texts):
    return [dict(zip(("type", "value"), text.split(":", 1))) for text in texts]


def test_heartbeats_change_scopes_and_references(office):
    """Also the reference to the worktree itself: what is removed is not looked at, what is added is."""
    other = office.tree.worktree("other")
    other.put("only here")
    session = office.at_work("ada", scopes=pairs("module:a"))
    def kept():
        return [sorted(f"{k}:{v}" for k, v in found) for found in office.reading.session_pairs(session)]
    here = f"worktree:{office.tree.top}"
    assert kept() == [["module:a"], [here]]
    seq = office.ledger.journal.last
    beat = office.call("session.heartbeat", session_id=session)
    shaped(beat, "Heartbeat")
    assert beat["branch"] == "main" and office.ledger.journal.last == seq, "nothing changed: nothing is written"
    office.call("session.heartbeat", session_id=session, add_scopes=pairs("module:b", "module:a"), remove_scopes=pairs("module:zz"),
                add_refs=pairs("pr:42"))
    assert kept() == [["module:a", "module:b"], sorted(["pr:42", here])]
    assert [event["type"] for _, event in office.events] == ["session.update"]
    # removed and added at once: removal comes first
    office.call("session.heartbeat", session_id=session, add_scopes=pairs("module:a"), remove_scopes=pairs("module:a", "module:b"))
    assert kept()[0] == ["module:a"]
    moved = office.call("session.heartbeat", session_id=session, add_refs=pairs(f"worktree:{other.top}"), remove_refs=pairs(here))
    assert moved["branch"] == "other" and [c["path"] for c in moved["file_changes"]] == ["only here"]
    office.call("session.heartbeat", session_id=session, remove_refs=pairs(f"worktree:{other.top}"))
    before = office.context("ada")["git_updated_at"]
    office.call("session.heartbeat", session_id=session)
    assert office.context("ada")["git_updated_at"] == before, "nowhere to look"
    assert kept() == [["module:a"], ["pr:42"]]
    office.rebuilt()
    assert kept() == [["module:a"], ["pr:42"]]


def test_only_worktrees_of_this_repository_are_looked_at(office, tmp_path):
    """Whatever a session says: another repository, a folder of ours, a name, one that has gone, one in whose place another one lies."""
    alien, gone, usurped = Tree(tmp_path / "alien"), office.tree.worktree("gone"), office.tree.worktree("usurped")
    mark = tmp_path / "mark"
    (tmp_path / "planted").mkdir()
    script = plant(tmp_path / "planted", mark, "exit 1")
    shutil.rmtree(gone.path)
    shutil.rmtree(usurped.path)
    usurped = Tree(usurped.path)
    os.makedirs(office.tree.file("folder"))
    for tree in (alien, usurped):
        tree.put("secret")
        tree.git("config", "filter.evil.clean", script)
        tree.put(".gitattributes", "* filter=evil\n")
    os.symlink(alien.top, tmp_path / "link")
    office.call("agent.register", name="eve", role="r", module="m", force=True)
    for place in (alien.top, gone.top, usurped.top, office.tree.top + "/folder", office.tree.top + "/.git", "repo", ".", "", "/", "~", "-x",
                  str(tmp_path / "link"), office.tree.top + "/../alien", "/proc/self/cwd", "x\n" + office.tree.top):
        try:
            started = office.call("session.start", agent_id="eve", refs=[{"type": "worktree", "value": place}])
        except thrum.ThrumError:
            continue                # no value of a reference at all
        beat = office.call("session.heartbeat", session_id=started["session_id"])
        assert "branch" not in started and "branch" not in beat and "file_changes" not in beat, place
        office.call("session.end", session_id=started["session_id"])
    assert "secret" not in json.dumps(office.who("secret")["contexts"]) and not office.who("secret")["unattended"]
    assert not mark.exists()
    link = tmp_path / "to us"
    os.symlink(office.tree.top, link)
    started = office.call("session.start", agent_id="eve", refs=[{"type": "worktree", "value": str(link)}])
    assert started["branch"] == "main", "another way to a worktree of ours is one"


def test_the_end_of_a_session_tells_what_it_did(office, tmp_path):
    """One agent.update event, which fits a line, and which another machine understands; the same after a rebuild."""
    tree = office.tree
    tree.git("checkout", "-q", "-b", "feature")
    names = [f"{'ü' * 100}/{'é' * 100}{n:04}" for n in range(600)]
    tree.commit(*names[:300], message="long names " + "x" * 70_000)
    for name in names[300:]:
        tree.put(name)
    session = office.at_work("ada")
    office.call("session.setIntent", session_id=session, intent="naming")
    tree.put("last minute")
    office.call("session.end", session_id=session)
    events = [event for _, event in office.events]
    assert [event["type"] for event in events] == ["agent.session.end", "agent.update"]
    assert len(thrum.canonical(events[1])) <= thrum.LINE_MAX
    work, = events[1]["work_contexts"]
    shaped({**work, "agent_id": "ada"}, "WorkContext")
    assert work["branch"] == "feature" and work["intent"] == "naming" and work["uncommitted_files"] and work["changed_files"]
    before = answers(office.reading, [])
    kept = office.reading.work_context(session)
    office.rebuilt()
    assert not difference(before, answers(office.reading, []))
    again = office.reading.work_context(session)
    for field in ("branch", "worktree_path", "intent", "git_updated_at", "intent_updated_at"):
        assert again[field] == kept[field]

    other = Office(tmp_path / "elsewhere")
    other.take_over(office)
    try:
        told = other.who(work["changed_files"][0])["contexts"]
        assert [(c["agent_id"], c["live"], c["branch"], c["session_id"]) for c in told] == [("ada", False, "feature", session)]
        assert told[0]["git_updated_at"] == work["git_updated_at"] and told[0]["hostname"]
        assert other.who(work["uncommitted_files"][0])["contexts"] and not other.who("nothing")["contexts"]
        assert other.call("team.list")["members"] == [], "it has ended"
        member, = other.call("team.list", include_offline=True)["members"]
        assert member["status"] == "offline" and member["agent_id"] == "ada"
    finally:
        other.close()


@pytest.mark.parametrize("subject", [1, 1_000, 100_000])
def test_any_session_can_end(office, subject):
    """200 commits with subjects of any length, and the longest names that a file system takes."""
    tree = office.tree
    tree.git("checkout", "-q", "-b", "feature")
    for n in range(3):
        tree.commit(f"{'a' * 255}/{'b' * 255}/{'c' * 255}/{n}", message="\x01" * subject)
    session = office.at_work("ada")
    office.call("session.end", session_id=session)
    assert all(len(thrum.canonical(event)) <= thrum.LINE_MAX for _, event in office.events)
    assert [event["type"] for _, event in office.events] == ["agent.session.end", "agent.update"]


def test_a_session_without_git_ends_too(office):
    """Nothing to tell: no event; an intent alone is told (the reference loses it)."""
    office.call("agent.register", name="ada", role="r", module="m", force=True)
    session = office.call("session.start", agent_id="ada")["session_id"]
    office.call("session.end", session_id=session)
    assert [event["type"] for _, event in office.events] == ["agent.session.end"]
    session = office.call("session.start", agent_id="ada")["session_id"]
    office.call("session.setTask", session_id=session, current_task="beads:1")
    office.call("session.end", session_id=session)
    assert [event["type"] for _, event in office.events] == ["agent.session.end", "agent.update"]


def test_git_that_fails_stops_no_session(office):
    """A damaged repository: sessions start, beat and end without git's words."""
    session = office.at_work("ada")
    head = office.tree.path / ".git" / "HEAD"
    good = head.read_bytes()
    head.write_bytes(b"nonsense\n")
    try:
        beat = office.call("session.heartbeat", session_id=session)
        shaped(beat, "Heartbeat")
        office.who("x")
        office.call("session.end", session_id=session)
        office.at_work("ada")
    finally:
        head.write_bytes(good)


def test_what_is_stale(office):
    """24 hours without a commit of its own, 7 days after the end; a commit, an intent and a task outlive the first."""
    quiet, busy = office.tree, office.tree.worktree("busy")
    busy.commit("done")
    quiet.put("loose")
    first, second = office.at_work("quiet", quiet), office.at_work("busy", busy)
    for session in (first, second):
        office.call("session.setIntent", session_id=session, intent="as before")
        office.call("session.setTask", session_id=session, current_task="t")
    office.again(days=0.9)
    assert office.context("quiet")["uncommitted_files"] == ["loose"] and office.context("busy")["branch"] == "busy"
    office.again(days=0.2)
    stale, fresh = office.context("quiet"), office.context("busy")
    assert not {"branch", "git_updated_at", "uncommitted_files", "file_changes"} & set(stale)
    assert stale["intent"] == "as before" and stale["current_task"] == "t"
    assert fresh["branch"] == "busy" and fresh["changed_files"] == ["done"]
    assert office.call("agent.listContext", branch="main")["contexts"] == [] \
        and office.call("agent.listContext", file="loose")["contexts"] == []
    assert [c["agent_id"] for c in office.who("loose")["contexts"]] == ["quiet"], "git itself is asked"
    assert [c["agent_id"] for c in office.call("agent.listContext", file="loose", fresh=True)["contexts"]] == ["quiet"]
    member = {m["agent_id"]: m for m in office.call("team.list")["members"]}["quiet"]
    assert member["branch"] == "main" and [c["path"] for c in member["file_changes"]] == ["loose"] and member["intent"] == "as before"
    office.call("session.heartbeat", session_id=first)
    assert office.context("quiet")["branch"] == "main"
    office.call("session.end", session_id=second)
    office.again(days=6.9)
    assert office.call("agent.whoami", caller_agent_id="busy").get("intent") == "as before"
    office.again(days=0.2)
    assert "intent" not in office.call("agent.whoami", caller_agent_id="busy")


def test_agents_of_another_machine(office, tmp_path):
    """Their last known state, with its age and the name of their machine; never asked from git here."""
    far = Office(tmp_path / "far")
    far.tree.git("checkout", "-q", "-b", "away")
    far.tree.commit("shared", "d/x")
    far.tree.put("loose")
    session = far.at_work("zoe")
    far.call("session.end", session_id=session)
    told = far.world.at
    far.at_work("zoe")              # at work again, which nobody elsewhere sees in detail
    far.close()
    office.take_over(far)
    office.world.at = told + 3_600 * thrum.NS
    office.tree.put("shared")
    office.at_work("ada")
    found = {c["agent_id"]: c for c in office.who("shared")["contexts"]}
    assert (found["ada"]["live"], found["zoe"]["live"]) == (True, False)
    assert found["zoe"]["branch"] == "away" and found["zoe"]["hostname"] and "hostname" not in found["ada"]
    assert thrum.ns_of(found["zoe"]["git_updated_at"]) <= told
    assert [c["path"] for c in found["zoe"]["file_changes"]] == ["shared"]
    assert {c["path"] for c in office.who("d")["contexts"][0]["file_changes"]} == {"d/x"}
    assert office.who("loose")["contexts"][0]["uncommitted_files"] == ["loose"]
    assert "zoe" in {m["agent_id"] for m in office.call("team.list")["members"]}
    office.again(days=8)
    assert "zoe" not in {c["agent_id"] for c in office.who("shared")["contexts"]}, "too long ago"


def test_who_has_without_a_session_and_without_a_worktree(office):
    """Changes where nobody has a session are named with the agents that live there; a worktree that has gone is remembered."""
    one, two = office.tree.worktree("one"), office.tree.worktree("two")
    one.put("f")
    two.put("f")
    two.commit("g")
    two.put("h")
    session = office.at_work("bob", two)
    found = office.who("f")
    assert found["contexts"] == [] or [c["agent_id"] for c in found["contexts"]] == ["bob"]
    assert [(left["worktree_path"], left["branch"], left["agents"]) for left in found["unattended"]] == [(one.top, "one", [])]
    shutil.rmtree(two.path)
    found = office.who("h")
    assert [(c["agent_id"], c["live"], c["uncommitted_files"]) for c in found["contexts"]] == [("bob", False, ["h"])]
    assert office.who("g")["contexts"][0]["changed_files"] == ["f", "g"] or office.who("g")["contexts"][0]["changed_files"] == ["g"]
    shaped(office.call("session.heartbeat", session_id=session), "Heartbeat")
    office.call("session.end", session_id=session)
    assert office.who("h")["contexts"] == []


def test_agents_that_share_a_worktree(office):
    office.tree.put("f")
    office.at_work("ada")
    office.at_work("bob")
    assert sorted(c["agent_id"] for c in office.who("f")["contexts"]) == ["ada", "bob"] and not office.who("f")["unattended"]


def test_who_is_looked_at_unasked(office):
    """Agents of this machine with an open session, whose work was not looked at for a minute."""
    def due(agent_id):
        return thrum._to_look_at(thrum.Context(office.world, office.reading, office.ledger), {"agent_id": agent_id})
    session = office.at_work("ada")
    office.call("agent.register", name="idle", role="i", module="m", force=True)
    assert due("ada") is None and due("idle") is None and due("nobody") is None
    office.world.at += thrum.SYNC_S * thrum.NS
    assert due("ada") == session and due("idle") is None
    office.call("session.heartbeat", session_id=session)
    assert due("ada") is None
    office.world.at += 2 * thrum.SYNC_S * thrum.NS
    office.call("session.end", session_id=session)
    assert due("ada") is None


@pytest.mark.parametrize("setting, commits", [("develop", 1), ("older", 2), ("nowhere", 2)])
def test_the_base_can_be_set(tmp_path, setting, commits):
    tree = Tree(tmp_path / "repo")
    tree.git("branch", "older")
    tree.git("checkout", "-q", "-b", "develop")
    tree.commit("a")
    tree.git("checkout", "-q", "-b", "feature")
    tree.commit("b")
    (tree.path / ".thrum").mkdir()
    (tree.path / ".thrum" / "config.json").write_text(json.dumps({"work": {"base": setting}}))
    tree.git("config", "core.excludesFile", "/dev/null")
    assert len(tree.facts()["unmerged_commits"]) == commits


# ---- through the daemon

@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    """@ada in the main worktree, @bob in a linked one with work in it."""
    made = Team(tmp_path_factory.mktemp("work"))
    ada, bob = Tree(made.ada.path), Tree(made.bob.path)
    ada.put("info", "")             # what `init` has written is committed, so that nothing but the tests' own is changed
    ada.commit("README.md", "src/lexer.py", "src/sub/deep.py", "a b")
    bob.git("reset", "-q", "--hard", "main")
    bob.commit("src/parser.py")
    bob.put("src/lexer.py", "changed\n")
    bob.put("src/new.py")
    yield made
    made.close()


def test_paths_are_those_of_the_caller(crew, tmp_path):
    """Relative to where it is called, absolute, with a slash behind, through ".." and "."; always the same answer."""
    bob = crew.bob
    wanted = crew.ada.ok("who-has", "src/lexer.py")
    assert re.match(r"@bob is editing src/lexer\.py \(\+1 -2, modified [^)]+\), branch: bob\n$", wanted), wanted
    for cwd, path in (("src", "lexer.py"), ("src", "./lexer.py"), ("src/sub", "../lexer.py"), (".", "src//lexer.py"), (".",
        "src/sub/../lexer.py"),
                      (".", "./src/./lexer.py"), ("src", str(bob.path / "src/lexer.py")), (".", "src/lexer.py/"), ("src/sub",
                      "../../src/lexer.py")):
        assert bob.ok("who-has", path, cwd=bob.path / cwd) == wanted, (cwd, path)
    assert bob.ok("--repo", str(bob.path), "who-has", str(bob.path / "src/lexer.py"), cwd=tmp_path) == wanted
    for path, cwd in (("src", "."), (".", "src"), ("src/", "."), (str(bob.path / "src"), ".")):
        found = bob.json("who-has", path, cwd=bob.path / cwd)
        assert found["file"] == "src" and set(found["contexts"][0]["uncommitted_files"]) == {"src/lexer.py", "src/new.py"}
        assert found["contexts"][0]["changed_files"] == ["src/parser.py"]
    everything = bob.json("who-has", ".")
    assert everything["file"] == "" and len(everything["contexts"][0]["file_changes"]) == 3
    for path in (str(bob.path), "src/.."):
        assert bob.json("who-has", path)["contexts"][0]["file_changes"] == everything["contexts"][0]["file_changes"]
    assert "this repository" in crew.ada.ok("who-has", ".") or "@bob" in crew.ada.ok("who-has", ".")
    assert "No agents are currently editing README.md" in bob.ok("who-has", "README.md")
    assert "No agents are currently editing src/lexer.pyx" in bob.ok("who-has", "src/lexer.pyx")
    assert "No agents are currently editing src/lexer" in bob.ok("who-has", "src/lexer")


@pytest.mark.parametrize("path, words", [
    ("", "the path is empty"), ("../outside", "is outside of the repository"), ("/etc/passwd", "is outside of the repository"),
    ("src/../../x", "is outside of the repository"), (".git", "git's own"), (".git/config", "git's own"), ("src/../.git/x", "git's own"),
    ("x" * 5_000, "cannot be a path"), ("a/" * 2_500, "cannot be a path"), ("..", "is outside of the repository"), ("/",
    "is outside of the repository"),
])
def test_paths_that_are_none_of_ours(crew, path, words):
    before = crew.trace()
    line = error_line(crew.bob.run("who-has", path))
    assert words in line and "file is required" not in line
    assert crew.trace() == before
    with contextlib.closing(crew.bob.client()) as client, pytest.raises(thrum.ThrumError):
        client.call("work.whoHas", file=path)


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", ".git/x", "a\0b", "x" * 2_000, "a/../../b", "\ud800"])
def test_paths_of_a_socket_are_held_to_the_same(crew, file):
    with contextlib.closing(crew.bob.client()) as client:
        with pytest.raises(thrum.ThrumError) as caught:
            client.call("work.whoHas", file=file)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 3_000
        assert client.call("health")["status"] == "ok"


def test_names_that_a_terminal_would_obey(crew):
    """Files, branches, intents and subjects of every kind: one line each, nothing raw, and columns that stand below one another."""
    bob, tree = crew.bob, Tree(crew.bob.path)
    evil = "ev" + POISON.replace("/", "") + "il\nname"
    tree.put("odd/" + evil)
    tree.put("odd/" + "l" * 200)
    bob.ok("session", "set-intent", "words " + POISON + " and more " * 40)
    tree.git("checkout", "-q", "-b", "long/" + "branch-" * 25)
    tree.git("commit", "-q", "--allow-empty", "-m", POISON + "subject " * 40)
    bob.ok("session", "heartbeat")
    try:
        for words in (["team"], ["overview"], ["status"], ["agent", "list", "--context"], ["agent", "list"], ["agent", "context"],
                      ["agent", "context", "bob"], ["who-has", "odd"], ["who-has", "odd/" + evil], ["who-has", "odd/" + "l" * 200],
                          ["ping", "@bob"],
                      ["session", "heartbeat"], ["prime"]):
            for columns in ("80", "200"):
                out = crew.bob.ok(*words, env={"COLUMNS": columns})
                assert not raw_in(out), words
                assert out.endswith("\n"), words
                trailing = [line for line in out.splitlines() if line != line.rstrip()]
                assert not trailing or words == ["prime"], (words, trailing)
        out = crew.ada.ok("agent", "list", "--context", env={"COLUMNS": "80"})
        lines = out.splitlines()
        assert not [line for line in lines if len(line) > 80]
        for head in ("SESSION", "BRANCH", "COMMITS", "FILES", "INTENT", "UPDATED"):
            column = lines[0].index(head)
            assert all(line[column - 2:column] == "  " and line[column] != " " for line in lines[1:]), out
        out = crew.ada.ok("who-has", "odd/" + evil)
        assert out.count("\n") == 1 and out.startswith("@bob is editing odd/ev")
        files = [line for line in crew.ada.ok("team", env={"COLUMNS": "80"}).splitlines() if re.match(r" {2}(Files:| {6}) ", line)]
        assert len(files) >= 5
    finally:
        tree.git("checkout", "-q", "bob")
        shutil.rmtree(tree.file("odd"))
        bob.ok("session", "heartbeat")


def test_team_and_overview_in_words(crew):
    crew.bob.ok("session", "heartbeat")
    out = crew.ada.ok("team", env={"COLUMNS": "80"})
    block = next(block for block in out.split("\n\n") if block.startswith("● @bob"))
    assert "[bob]" in block.splitlines()[0] and "  Worktree: bob" in block and "(1 commit" in block and "src/lexer.py" in block \
        and "+1 -2" in block
    crew.bob.ok("session", "end")
    try:
        assert "@bob" not in crew.ada.ok("team") and re.search(r"○ @bob[^\n]*\n(.*\n)*?.*offline \(last seen", crew.ada.ok("team", "--all"))
        out = crew.ada.ok("who-has", "src/lexer.py")
        assert out.startswith("No agents are currently editing src/lexer.py\nUncommitted in ") and "@bob, who has no session" in out
        assert crew.ada.json("who-has", "src/lexer.py")["unattended"][0]["agents"] == ["bob"]
    finally:
        crew.bob.ok("session", "start")
    assert crew.bob.json("status")["work_context"]["uncommitted_files"]
    assert "1 ahead" in crew.bob.ok("status") and "1 changed, 2 uncommitted" in crew.bob.ok("status")
    assert "@bob" in crew.ada.ok("overview")


@pytest.mark.parametrize("words, shape_name", [(["team"], "cli team"), (["team", "--all"], "cli team"), (["who-has", "src/lexer.py"],
    "cli who-has"),
                                               (["who-has", "nothing"], "cli who-has"), (["who-has", "src"], "cli who-has")])
def test_shapes(crew, words, shape_name):
    shaped(crew.ada.json(*words), shape_name)
    with contextlib.closing(crew.ada.client()) as client:
        for params in ({}, {"include_offline": True}, {"all": True}):
            shaped(client.call("team.list", **params), "rpc team.list")
        shaped(client.call("agent.listContext", file="src/lexer.py"), "rpc agent.listContext")


def test_filters_of_agent_context(crew):
    crew.bob.ok("session", "heartbeat")
    def names(*args):
        return [work["agent_id"] for work in crew.ada.json("agent", "context", *args)["contexts"]]
    assert names("--file", "src/lexer.py") == ["bob"] == names("--branch", "bob") == names("--agent", "implementer") == names("--agent",
        "@bob")
    assert names("--file", "src/parser.py") == ["bob"] \
        and names("--file", "src/lexer") == [] == names("--file", "%") == names("--branch", "bo")
    assert names("--branch", "bob", "--file", "README.md") == [] and "ada" in names("--branch", "main")
    out = crew.ada.ok("agent", "context", "bob")
    assert re.search(r"^Branch: bob$", out, re.M) and "Unmerged Commits (1):\n" in out and "[src/parser.py]" in out \
        and "Uncommitted: 2\n" in out


def stand_in(folder, real):
    """A `git` that hangs while the file `hang` is there; gives the folder for PATH and that file."""
    hang = folder / "hang"
    path = folder / "bin" / "git"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\n[ -e "{hang}" ] && exec sleep 60\nexec "{real}" "$@"\n')
    path.chmod(0o755)
    return str(path.parent), hang


def test_a_git_that_hangs(tmp_path):
    """A heartbeat ends with git's time limit, who-has answers with what was known, and quick calls do not wait meanwhile."""
    folder, hang = stand_in(tmp_path, shutil.which("git"))
    env = {"PATH": folder + os.pathsep + os.environ["PATH"]}
    (tmp_path / "repo").mkdir()
    repo, tree = Repo(tmp_path / "repo"), Tree(tmp_path / "repo")
    repo.git("init", "-q", "-b", "main")
    tree.commit("f")
    try:
        repo.join("ada", env=env)
        tree.put("f", "changed\n")
        repo.ok("session", "heartbeat")
        hang.write_text("")
        began = time.monotonic()
        beats = [start(repo, "session", "heartbeat", "--json", env={"THRUM_NAME": "ada"}) for _ in range(3)]
        with contextlib.closing(repo.client()) as client:
            for _ in range(20):
                asked = time.monotonic()
                client.call("agent.list")
                client.call("session.list")
                assert time.monotonic() - asked < 3
            found = client.call("work.whoHas", file="f")
        assert [(c["agent_id"], c["live"]) for c in found["contexts"]] == [("ada", False)]
        for beat in beats:
            status, out, err = finish(beat)
            assert status == 0 and json.loads(out)["branch"] == "main", err
        assert time.monotonic() - began < 6 * thrum.GIT_LOCAL_S
        hang.unlink()
        assert client is not None and repo.json("who-has", "f")["contexts"][0]["live"]
    finally:
        hang.unlink(missing_ok=True)
        repo.close()


def test_the_daemon_looks_at_those_who_do_something(make_repo, foreground):  # noqa: F811
    """Whoever does something need not send heartbeats; whoever only waits is not looked at, but is here."""
    repo = make_repo()
    for name in ("ada", "bob"):
        repo.join(name, "role_" + name, env={"THRUM_NAME": name})
    repo.ok("daemon", "stop")
    foreground(repo, "thrum.SYNC_S = 0.2")
    tree = Tree(repo.path)
    waiting = start(repo, "wait", "--timeout", "60s", env={"THRUM_NAME": "bob"})
    try:
        with contextlib.closing(repo.client()) as client:
            def context(name):
                return client.call("agent.listContext", agent_id=name)["contexts"][0]

            def seen():
                return {m["agent_id"]: m["last_seen"] for m in client.call("team.list")["members"]}
            until(lambda: client.call("health")["status"] == "ok" and waiting.poll() is None, "somebody waits")
            first, here = context("bob").get("git_updated_at"), seen()["bob"]
            until(lambda: seen()["bob"] > here, "whoever waits is here")
            here = seen()["bob"]
            settled = context("bob").get("git_updated_at")
            tree.put("new file")
            client.call("message.list", caller_agent_id="ada", for_agent="ada")
            until(lambda: "new file" in context("ada").get("uncommitted_files", ()), "what ada did was looked at")
            until(lambda: seen()["bob"] > here, "whoever waits is still here")
            assert context("bob").get("git_updated_at") in (first, settled), "nobody has looked at who only waits"
            assert "new file" not in context("bob").get("uncommitted_files", ())
    finally:
        waiting.kill()
        waiting.communicate()


@pytest.mark.parametrize("mode", [0o755, 0o644])
def test_a_staged_mode(tree, mode):
    """The same bytes with another mode are a change; also when only the mode in the commit differs."""
    tree.put("f")
    os.chmod(tree.file("f"), 0o644 if mode == 0o755 else 0o755)
    tree.git("add", "-A")
    tree.git("commit", "-q", "-m", "f")
    os.chmod(tree.file("f"), mode)
    tree.git("add", "f")
    os.utime(tree.path / ".git" / "index", (2e9, 2e9))
    assert list(tree.who("f")[0]) == ["f"]
