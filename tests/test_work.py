"""What agents do, as git says it: parsing, odd repositories, who-has against git's own answer, and what is never run."""

import base64
import collections
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import thrum
from conftest import CLEAN, FakeWorld, Repo
from generate import places_in
from shapes import shape, shaped
from team import POISON, Team, error_line, finish, raw_in, start

USER = ("-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "protocol.file.allow=always")


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
        return subprocess.run(["git", *USER, *args], cwd=self.top, env={**CLEAN, **more.pop("env", {})}, check=check,
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


NAMES = ["a", "b c", "é", "e\u0301", "日本/語", "d/x", "d/y z", "d/e/f", '"quoted"', "it's", "tab\tin", "new\nline", "\nfirst", "cr\rin", "-flag",
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
    status, moved, parts = [], set(), iter(tree.git("status", "--porcelain=v1", "-z", "-uall").split(b"\0")[:-1])
    for part in parts:
        status.append(part[3:])
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
        if b"\0" in before + after:
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
    file = tree.file(path)
    act = rng.choice(["edit", "same", "racy", "touch", "chmod", "link", "folder", "remove", "stage", "unstage", "intent", "skip", "assume",
                      "clear", "soft", "commit", "untrack", "refresh", "swap", "back", "dirlink", "dirback", "sparse", "hardlink", "copy", "stash"])
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
    elif act == "dirlink" and os.path.isdir(tree.file("d")) and not os.path.islink(tree.file("d")) and not os.path.exists(tree.file("moved")):
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
    """What the commit holds: path (bytes) -> blob."""
    found = {}
    for line in tree.git("ls-tree", "-r", "-z", "HEAD", check=False).split(b"\0")[:-1]:
        about, path = line.split(b"\t", 1)
        found[path] = about.split()[2].decode()
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ids", ["sha1", "sha256"])
def test_nothing_is_called_untouched_that_git_calls_changed(tmp_path, mode, ids):
    """Hundreds of histories of edits; and the quick look is of use: it knows of the untouched ones that they are."""
    said = asked = 0
    for seed in range(16):
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
                if thrum._is_untouched(tree.top, path, blobs.get(raw, "")):
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
