"""Which worktrees would not merge: as git itself finds it when it merges, without a trace, and told once."""

import asyncio
import os
import random
import re
import shutil
import stat
import subprocess
import time

import pytest

import thrum
from conftest import CLEAN, Repo
from shapes import shaped
from team import END_S, error_line
from test_daemon import foreground, prepare  # noqa: F401
from worktrees import Author, commit_pairs, lay_out

PAIRS = 200
STATES = 12
SCRATCH = ("-c", "user.name=T", "-c", "user.email=t@localhost", "-c", "merge.conflictStyle=merge", "-c", "core.autocrlf=false")


def git(top, *args, statuses=(0,), input=b""):
    """stdout of git as anybody calls it."""
    done = subprocess.run(["git", *SCRATCH, *args], cwd=top, env=CLEAN, input=input, capture_output=True)
    assert done.returncode in statuses, (args, done.stderr)
    return done.stdout


def looker(repo, world=None):
    """What looks for conflicts in a repository that is initialized, without a daemon."""
    return thrum.Conflicts(thrum.Work(thrum.find_places(str(repo.path)), world or thrum.World({})))


def files_in(files):
    """Every path that some conflicts name."""
    return {name for file in files for name in [file["path"], *file.get("names", ())]}


def numbered(lines):
    """The place of each line that occurs once."""
    found = {}
    for number, line in enumerate(lines, 1):
        found[line] = number if line not in found else 0
    return {line: number for line, number in found.items() if number}


def split(data):
    return data.replace(b"\r", b"").splitlines() if data else []


def blocks_of(merged, theirs):
    """The conflicts in a file that `git merge` has written: [(lines before, our lines, their lines)]; None if a text looks alike."""
    found, before, state = [], [], 0
    for line in split(merged):
        if line == b"<<<<<<< HEAD" or line.startswith(b"<<<<<<< HEAD:"):
            if state:
                return None
            state, ours, other = 1, [], []
        elif line == b"=======" and state:
            if state == 2:
                return None
            state = 2
        elif line == b">>>>>>> " + theirs or line.startswith(b">>>>>>> " + theirs + b":"):
            found.append((list(before), ours, other))
            before, state = before + ours, 0
        else:
            (before, ours, other)[state].append(line) if state else before.append(line)
    return found if not state else None


def check_ranges(file, merged, ours, theirs, b):
    """The ranges of a file are those that can be found by looking for the lines themselves; how many were looked at."""
    blocks = blocks_of(merged, b)
    if not blocks:
        return 0
    assert [len(side) for side in file["ranges"]] == [len(blocks)] * 2, file
    checked = 0
    for side, version in enumerate((split(ours), split(theirs))):
        places = numbered(version)
        for (before, *parts), (first, last) in zip(blocks, file["ranges"][side]):
            assert version[first - 1:last] == parts[side], (file, side)
            known = [places[line] - i for i, line in enumerate(parts[side]) if line in places]
            if known:
                assert known == [first] * len(known), (file, side)
                checked += 1
            elif not parts[side] and side == 0 and before and before[-1] in places:
                assert places[before[-1]] == last == first - 1, file
                checked += 1
    return checked


def unmerged(top, a):
    """The paths in conflict after `git merge`, under the names that they have in the commits."""
    paths = {part.split(b"\t", 1)[1] for part in git(top, "ls-files", "-u", "-z").split(b"\0") if part}
    return paths, {re.sub(rb"~(HEAD|[0-9a-f]{40})(_\d+)?$", b"", path).decode(errors="replace") for path in paths}


def really_merge(top, a, b):
    """Whether `git merge` of b into a in a worktree is clean, and the paths in conflict."""
    git(top, "checkout", "-q", "-f", "--detach", a)
    git(top, "clean", "-qfdx")
    git(top, "merge", "-q", "--no-commit", "--no-ff", "--allow-unrelated-histories", b, statuses=(0, 1))
    return unmerged(top, a)


@pytest.mark.slow
def test_conflicts_are_those_of_git_merge(make_repo):
    repo = prepare(make_repo())
    commits, trees = commit_pairs(repo.path, range(PAIRS))
    scratch = repo.worktree("scratch").path
    look, kinds, places, clean = looker(repo), set(), 0, 0
    os.makedirs(look.folder + "/objects")
    for seed, (_, a, b) in enumerate(commits):
        files = look.conflicts(str(repo.path), a, b)
        raw, paths = really_merge(scratch, a, b)
        assert bool(files) == bool(raw), f"seed {seed}"
        named = files_in(files)
        assert paths <= named, f"seed {seed}: {paths} {files}"
        assert {file["path"] for file in files} <= paths, f"seed {seed}: {paths} {files}"
        kinds |= {file["kind"] for file in files}
        clean += not files
        _, ours, theirs = trees[seed]
        for file in files:
            path = next((path for path in raw if path.decode(errors="replace") == file["path"]), None)
            if path in ours and path in theirs and "ranges" in file:
                merged = (scratch / os.fsdecode(path)).read_bytes()
                places += check_ranges(file, merged, ours[path][1], theirs[path][1], b.encode())
    assert {"contents", "add/add", "modify/delete", "binary", "rename/delete", "file/directory"} <= kinds, kinds
    assert PAIRS // 5 < clean < PAIRS * 4 // 5 and places > 30, (clean, places)


def test_lines_of_conflicts_in_large_and_strange_files(tmp_path):
    """`git merge-file` writes the conflicts; where its lines are in the versions is looked up line by line."""
    ours, theirs, found = "a" * 40, "b" * 40, 0
    for seed in range(60):
        author = Author(seed)
        base = author.text([author.line() for _ in range(author.rng.choice((1, 10, 300)))])
        versions = [author.edited(author.edited(base)) for _ in range(2)]
        for name, data in zip("oab", (base, *versions)):
            (tmp_path / name).write_bytes(data)
        merged = git(tmp_path, "merge-file", "-p", "-L", ours, "-L", "base", "-L", theirs, "a", "o", "b", statuses=range(128))
        ranges = thrum.conflict_ranges(merged, (ours, theirs), versions)
        as_merge = merged.replace(b"<<<<<<< " + ours.encode(), b"<<<<<<< HEAD")
        if ranges[0] and b"<<<<<<< HEAD\n" not in b"".join(versions):
            found += check_ranges({"ranges": ranges}, as_merge, *versions, theirs.encode())
    assert found > 40


# ---- states that are not committed

def fill(worktree, rng, base, target):
    """Bring a worktree from the tree `base` to `target`: a part committed, a part staged, the rest neither."""
    top = worktree.path
    middle = {path: target.get(path) for path in {*base, *target} if rng.random() < 0.4}
    half = {**{path: file for path, file in base.items() if path not in middle}, **{p: f for p, f in middle.items() if f}}
    half = {path: file for path, file in half.items() if not any(other.startswith(path + b"/") for other in half)}
    lay_out(top, half)
    git(top, "add", "-A")
    if rng.random() < 0.5:
        git(top, "commit", "-q", "--allow-empty", "-m", "half")
    lay_out(top, target)
    for path in list(target):
        if rng.random() < 0.3:
            git(top, "--literal-pathspecs", "add", "--", os.fsdecode(path))


def committed_for_real(repo, worktree, folder):
    """A clone with the worktree's HEAD and files, and everything in it committed."""
    clone = folder / ("clone of " + worktree.path.name)
    git(folder, "clone", "-q", "--no-checkout", str(repo.path), str(clone))
    git(clone, "checkout", "-q", "--detach", git(worktree.path, "rev-parse", "HEAD").decode().strip())
    for name in os.listdir(clone):
        if name != ".git":
            shutil.rmtree(clone / name) if (clone / name).is_dir() and not (clone / name).is_symlink() else os.unlink(clone / name)
    for name in os.listdir(worktree.path):
        if name not in (".git", ".thrum"):
            source = worktree.path / name
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, clone / name, symlinks=True)
            else:
                shutil.copy2(source, clone / name, follow_symlinks=False)
    git(clone, "add", "-A")
    git(clone, "commit", "-q", "--allow-empty", "-m", "all")
    return clone


@pytest.mark.slow
def test_uncommitted_and_untracked_work_counts_as_if_it_were_committed(make_repo, tmp_path):
    repo = prepare(make_repo())
    one, two = repo.worktree("one"), repo.worktree("two")
    commits, trees = commit_pairs(repo.path, range(1000, 1000 + STATES))
    look, conflicting = looker(repo), 0
    for seed, ((base, _, _), (tree, *targets)) in enumerate(zip(commits, trees)):
        rng = random.Random(seed)
        for worktree, target in zip((one, two), targets):
            git(worktree.path, "reset", "-q", "--hard", base)
            git(worktree.path, "clean", "-qfdx", "-e", ".thrum")
            fill(worktree, rng, tree, target)
        before = snapshot(repo, one, two)
        present, found, errors = look.look([str(one.path), str(two.path)], lambda a, b: b)
        assert not errors, f"seed {seed}: {errors}"
        assert (after := snapshot(repo, one, two)) == before, (seed, changes(before, after))
        folder = tmp_path / f"scratch {seed}"
        folder.mkdir()
        clones = [committed_for_real(repo, worktree, folder) for worktree in (one, two)]
        for worktree, clone in zip((one, two), clones):
            tree_id = look._run(str(worktree.path), "rev-parse", present[str(worktree.path)].commit + "^{tree}").decode().strip()
            assert tree_id == git(clone, "rev-parse", "HEAD^{tree}").decode().strip(), f"seed {seed} {worktree.path.name}"
        a, b = (git(clone, "rev-parse", "HEAD").decode().strip() for clone in clones)
        git(clones[0], "fetch", "-q", str(clones[1]), "HEAD")
        raw, paths = really_merge(clones[0], a, b)
        files = found[str(one.path), str(two.path)]
        assert bool(files) == bool(raw) and {file["path"] for file in files} <= paths <= files_in(files), f"seed {seed}"
        conflicting += bool(files)
    assert 1 < conflicting < STATES - 1


# ---- nothing is changed

def everything(top):
    """Every file below a folder: its bytes, mode and time of change; `.thrum` is our own.

    Git renews the time of a file in its folders where it finds an object that it would write, or a part of an index.
    """
    found = {}
    for path, folders, names in os.walk(os.fsencode(top)):
        folders[:] = [name for name in folders if name != b".thrum"]
        for name in names + folders:
            full = os.path.join(path, name)
            about = os.lstat(full)
            data = b""
            if stat.S_ISLNK(about.st_mode):
                data = os.readlink(full)
            elif stat.S_ISREG(about.st_mode):
                data = thrum.file_bytes(full)
            renewed = b"/objects/" in full or b"/sharedindex." in full
            found[full] = about.st_mode, 0 if renewed else about.st_mtime_ns, data
    return found


def changes(before, after):
    return sorted({path for a, b in zip(before, after) for path in {*a[0], *b[0]} if a[0].get(path) != b[0].get(path)})


def snapshot(*repos):
    return [(everything(repo.path), git(repo.path, "--no-optional-locks", "status", "--porcelain=v2", "-z")) for repo in repos]


def numbers(*lines):
    return "".join(f"line {line}\n" for line in lines)


@pytest.fixture
def two(make_repo):
    """A repository with the agents' worktrees `one` and `two`, each with one file of 20 lines."""
    repo = prepare(make_repo())
    (repo.path / "a.txt").write_text(numbers(*range(1, 21)))
    repo.git("add", "a.txt")
    repo.git("commit", "-q", "-m", "a")
    return repo, repo.worktree("one"), repo.worktree("two")


def compare(repo, *worktrees, look=None):
    """Look at some worktrees: (conflicting files of each pair, errors, {worktree: Present})."""
    tops = [str(worktree.path) for worktree in worktrees]
    before = snapshot(repo, *worktrees)
    present, found, errors = (look or looker(repo)).look(tops, lambda a, b: b)
    assert (after := snapshot(repo, *worktrees)) == before, changes(before, after)
    return [found.get((a, b)) for i, a in enumerate(tops) for b in tops[i + 1:]], errors, present


def edit(worktree, line, text, file="a.txt"):
    path = worktree.path / file
    lines = path.read_text().splitlines(keepends=True)
    lines[line - 1:line] = [text]
    path.write_text("".join(lines))


def test_where_it_conflicts(two):
    repo, one, other = two
    edit(one, 10, "ten\n")
    edit(other, 1, "zero\nmore\nline 1\n")
    assert compare(repo, one, other) == ([[]], {}, compare(repo, one, other)[2])
    edit(other, 12, "dix\nonze\n")
    assert compare(repo, one, other)[0] == [[{"path": "a.txt", "kind": "contents", "ranges": [[[10, 10]], [[12, 13]]]}]]
    edit(one, 10, "")
    assert compare(repo, one, other)[0] == [[{"path": "a.txt", "kind": "contents", "ranges": [[[10, 9]], [[12, 13]]]}]]


def test_a_second_look_without_changes_starts_no_merge(two, monkeypatch):
    repo, one, other = two
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\n")
    (other.path / "new").write_text("new\n")
    os.utime(one.path / "a.txt", (1_000_000_000, 1_000_000_000))
    commands, run, look = [], thrum.Git.run, looker(repo)
    monkeypatch.setattr(thrum.Git, "run", lambda self, *args, **more: commands.append(args) or run(self, *args, **more))
    first = compare(repo, one, other, look=look)
    assert sum("merge-tree" in args for args in commands) == 1 and sum("cat-file" in args for args in commands) == 2
    commands.clear()
    assert compare(repo, one, other, look=look) == first
    assert not [args for args in commands if "merge-tree" in args or "cat-file" in args]
    # Once what has changed is older than the resolution of its times, not even its commit is made again.
    look.work.world.now_ns = lambda: thrum.FAR - 1
    compare(repo, one, other, look=look)
    commands.clear()
    assert compare(repo, one, other, look=look) == first
    assert all({"status", "for-each-ref", "rev-list"} & set(args) for args in commands), commands
    commands.clear()
    edit(one, 11, "eleven\n")
    assert compare(repo, one, other, look=look) != first
    assert sum("merge-tree" in args for args in commands) == 1


def test_objects_are_bounded_and_go_with_the_daemon(two, monkeypatch):
    repo, one, other = two
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\n")
    look = looker(repo)
    first = compare(repo, one, other, look=look)
    assert stat.S_IMODE(os.stat(look.folder).st_mode) == 0o700
    monkeypatch.setattr(thrum, "OBJECTS_MAX", 0)
    edit(other, 11, "onze\n")
    emptied = compare(repo, one, other, look=look)
    assert emptied[0] != first[0] and not emptied[1]
    look.close()
    assert not os.path.exists(look.folder)
    with pytest.raises(thrum.ThrumError):
        look.present(str(one.path))


# ---- odd worktrees

def test_what_is_too_large_is_left_out(two, monkeypatch):
    repo, one, other = two
    monkeypatch.setattr(thrum, "PRESENT_FILE_MAX", 1000)
    for worktree in (one, other):
        (worktree.path / "big").write_text(worktree.path.name * 1000)
        (worktree.path / "small").write_text(worktree.path.name)
    (files,), errors, present = compare(repo, one, other)
    assert files == [{"path": "small", "kind": "add/add", "ranges": [[[1, 1]], [[1, 1]]]}] and not errors
    assert [state.skipped for state in present.values()] == [["big"], ["big"]]
    monkeypatch.setattr(thrum, "PRESENT_MAX", 5)
    (other.path / "small").write_text("0123456789")
    (files,), errors, present = compare(repo, one, other)
    assert list(errors) == [str(other.path)] and "1 uncommitted files of 0 MB" in errors[str(other.path)]


def test_a_detached_head_and_a_merge_in_progress(two):
    repo, one, other = two
    edit(one, 10, "ten\n")
    one.git("commit", "-qam", "ten")
    edit(other, 10, "dix\n")
    other.git("commit", "-qam", "dix")
    other.git("checkout", "-q", "--detach")
    assert [file["path"] for file in compare(repo, one, other)[0][0]] == ["a.txt"]
    git(other.path, "merge", "-q", "one", statuses=(1,))
    present = compare(repo, one, other)
    assert present[0] == [[]], "with the other commit as a parent, what stands there is what it comes to"
    (other.path / "a.txt").unlink()
    assert compare(repo, one, other)[:2] == ([[]], {})
    git(other.path, "merge", "--abort")
    assert [file["path"] for file in compare(repo, one, other)[0][0]] == ["a.txt"]


def test_submodules_and_repositories_inside(two, make_repo):
    repo, one, other = two
    library = make_repo("library")
    git(repo.path, "-c", "protocol.file.allow=always", "submodule", "-q", "add", str(library.path), "lib")
    repo.git("commit", "-qam", "lib")
    for worktree in (one, other):
        worktree.git("merge", "-q", "main")
        git(worktree.path, "-c", "protocol.file.allow=always", "submodule", "-q", "update", "--init")
    assert compare(repo, one, other)[:2] == ([[]], {})
    for number, worktree in enumerate((one, other)):
        git(worktree.path / "lib", "commit", "-q", "--allow-empty", "-m", str(number))
        git(worktree.path, "init", "-q", "inside")
        (worktree.path / "inside" / "file").write_text(str(number))
    repo.git("worktree", "add", "-q", "-b", "below", str(one.path / "below"))
    (files,), errors, _ = compare(repo, one, other)
    assert [file["path"] for file in files] == ["lib"] and files[0]["kind"].startswith("submodule") and not errors
    git(other.path / "lib", "checkout", "-q", "HEAD~")
    assert compare(repo, one, other)[:2] == ([[]], {})


def test_sparse_checkouts_and_split_indices(two):
    repo, one, other = two
    for folder in ("in", "out"):
        (repo.path / folder).mkdir()
        (repo.path / folder / "file").write_text(numbers(*range(9)))
    repo.git("add", "in", "out")
    repo.git("commit", "-qm", "more")
    for worktree in (one, other):
        worktree.git("merge", "-q", "main")
    git(one.path, "sparse-checkout", "set", "--cone", "--sparse-index", "in")
    git(other.path, "update-index", "--split-index")
    edit(one, 3, "three\n", "in/file")
    edit(other, 3, "trois\n", "in/file")
    edit(other, 3, "trois\n", "out/file")
    assert not (one.path / "out").exists()
    (files,), errors, _ = compare(repo, one, other)
    assert [file["path"] for file in files] == ["in/file"] and not errors


def test_links_and_folders_that_take_places(two):
    repo, one, other = two
    for name in ("folder/a", "folder/b", "file"):
        (repo.path / name).parent.mkdir(exist_ok=True)
        (repo.path / name).write_text(numbers(1, 2, 3))
    repo.git("add", "-A")
    repo.git("commit", "-qm", "more")
    for worktree in (one, other):
        worktree.git("merge", "-q", "main")
    shutil.move(one.path / "folder", one.path / "elsewhere")
    (one.path / "folder").symlink_to("elsewhere")
    (one.path / "file").unlink()
    (one.path / "file").mkdir()
    (one.path / "file" / "inside").write_text("x\n")
    look = looker(repo)
    pairs, errors, present = compare(repo, one, other, look=look)
    assert (pairs, errors) == ([[]], {})
    names = look._run(str(one.path), "ls-tree", "-r", "--name-only", present[str(one.path)].commit).decode().split()
    assert names == [".gitignore", "a.txt", "elsewhere/a", "elsewhere/b", "file/inside", "folder"]


def test_no_commits_yet(make_repo):
    repo = prepare(make_repo(commit=False))
    look = looker(repo)
    assert compare(repo, repo, look=look)[1] == {}
    (repo.path / "file").write_text("x\n")
    _, errors, present = compare(repo, repo, look=look)
    assert not errors and present[str(repo.path)].commit == present[str(repo.path)].base


def test_a_shallow_clone(two, tmp_path):
    repo, one, other = two
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repo.path}", "shallow")
    clone = prepare(Repo(tmp_path / "shallow"))
    one, other = clone.worktree("three"), clone.worktree("four")
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\n")
    other.git("commit", "-qam", "dix")
    (files,), errors, _ = compare(clone, one, other)
    assert [file["path"] for file in files] == ["a.txt"] and not errors


def test_a_worktree_that_cannot_be_looked_at_keeps_nobody_else_waiting(two):
    repo, one, other = two
    third = repo.worktree("third")
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\n")
    git_file = third.path / ".git"
    git_file.write_text("gitdir: /nowhere\n")
    tops = [str(worktree.path) for worktree in (one, third, other)]
    present, found, errors = looker(repo).look([*tops, str(repo.path / "gone")], lambda a, b: b)
    assert [file["path"] for file in found[tops[0], tops[2]]] == ["a.txt"] and len(found) == 1
    assert set(errors) == {tops[1], str(repo.path / "gone")} and all("\n" not in error for error in errors.values())


def test_attributes_and_settings_of_the_user(two):
    """`merge=union` and `-merge` count as in a merge; another style of conflict, CRLF or a split index confuse nothing."""
    repo, one, other = two
    for name in ("conflictStyle", "renames"):
        repo.git("config", "merge." + name, {"conflictStyle": "diff3", "renames": "true"}[name])
    repo.git("config", "core.autocrlf", "input")
    repo.git("config", "core.safecrlf", "true")
    repo.git("config", "core.splitIndex", "true")
    for worktree, word in ((one, "ten"), (other, "dix")):
        (worktree.path / ".gitattributes").write_text("*.union merge=union\n*.whole -merge\n")
        edit(worktree, 10, word + "\r\n")
        for ending in ("union", "whole"):
            (worktree.path / f"x.{ending}").write_text(word + "\n")
    (files,), errors, _ = compare(repo, one, other)
    assert not errors and files == [{"path": "a.txt", "kind": "contents", "ranges": [[[10, 10]], [[10, 10]]]},
                                    {"path": "x.whole", "kind": "binary"}]


def test_lines_that_repeat_take_no_time():
    """Where difflib takes minutes: what is not certain is not said, and what is certain stays so."""
    ours, theirs = "a" * 40, "b" * 40
    for values in (1, 3, 200, 40_000):
        base = [b"%d" % (number * 7919 % values) for number in range(40_000)]
        def version(word, *others, base=base):
            lines = list(base)
            lines[20_000] = word
            for at in others:
                lines[at] = b"clean %d" % at
            return lines
        a, b, both = version(b"ten", 100), version(b"dix", 39_000), version(b"", 100, 39_000)
        both[20_000] = b"<<<<<<< %s\nten\n=======\ndix\n>>>>>>> %s" % (ours.encode(), theirs.encode())
        merged, *versions = (b"\n".join(lines) + b"\n" for lines in (both, a, b))
        began = time.process_time()
        assert thrum.conflict_ranges(merged, (ours, theirs), versions) == [[[20_001, 20_001]]] * 2
        assert time.process_time() - began < 5
        # A conflict that only stands among others that repeat: it is not guessed where.
        alike = merged.replace(b"\nten\n", b"\n0\n").replace(b"\ndix\n", b"\n1\n")
        assert thrum.conflict_ranges(alike, (ours, theirs), [version.replace(b"\nten\n", b"\n5\n") for version in versions]) == [[], []]


def test_a_line_of_the_file_like_a_divider_leaves_the_lines_unsaid(two):
    repo, one, other = two
    edit(one, 10, "Title\n=======\n")
    edit(other, 10, "dix\n")
    assert compare(repo, one, other)[0] == [[{"path": "a.txt", "kind": "contents"}]]


def test_no_merge_driver_of_the_user_runs(two, tmp_path):
    """Their files are merged as text; drivers of git itself, attributes that are not committed and settings count as ever."""
    repo, one, other = two
    trace = tmp_path / "ran"
    driver = f"touch {trace} left-by-driver; false"
    repo.git("config", "merge.mine.driver", driver)
    repo.git("config", "merge.a.b.driver", driver)
    repo.git("config", "merge.named.name", "without a driver")
    repo.git("config", "extensions.worktreeConfig", "true")
    git(other.path, "config", "--worktree", "merge.here.driver", driver)
    repo.git("config", "merge.default", "mine")
    repo.git("config", "merge.renames", "false")
    with open(repo.path / ".git" / "config", "a") as file:
        file.write("[core]\n\tfilemode\n[odd \"sub\\\"section\"]\n\tvalue = \"a b\\n\"\n")
    for worktree, word in ((one, "ten"), (other, "dix")):
        (worktree.path / ".gitattributes").write_text(
            "*.mine merge=mine\n*.ab merge=a.b\n*.named merge=named\n*.here merge=here\n*.union merge=union\n*.whole -merge\n")
        edit(worktree, 10, word + "\n")
        for ending in ("mine", "ab", "named", "here", "union", "whole"):
            (worktree.path / f"x.{ending}").write_text(word + "\n")
    for pair in ((one, other), (other, one)):
        (files,), errors, _ = compare(repo, *pair)
        assert not errors and not trace.exists()
        assert {file["path"]: file["kind"] for file in files} == {
            "a.txt": "contents", "x.ab": "add/add", "x.here": "add/add", "x.mine": "add/add", "x.named": "add/add", "x.whole": "binary"}
        assert all(("ranges" in file) == (file["kind"] != "binary") for file in files)


def test_a_partial_clone_fetches_nothing(two, tmp_path):
    repo, one, other = two
    edit(one, 10, "ten\n")
    one.git("commit", "-qam", "ten")
    repo.git("config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", "--filter=blob:none", "--no-checkout", f"file://{repo.path}", "partial")
    clone, asked = prepare(Repo(tmp_path / "partial")), tmp_path / "asked"
    clone.git("config", "remote.origin.uploadpack", f"touch {asked}; git-upload-pack")
    clone.git("config", "protocol.file.allow", "always")
    look = looker(clone)
    os.makedirs(look.folder + "/objects")
    name = clone.git("rev-parse", "origin/one:a.txt").strip()
    for run in (lambda *args: look._run(str(clone.path), *args), thrum.Git(str(clone.path)).run):
        with pytest.raises(thrum.GitError):
            run("cat-file", "-p", name)
    assert not asked.exists()
    assert thrum.Git(str(clone.path)).run("cat-file", "-p", name, as_user=True).startswith(b"line 1\n") and asked.exists()


# ---- the command

OLD = """#!/bin/sh
case "$*" in *version*) echo "git version 2.30.9";; *) exec {git} "$@";; esac
"""


def test_an_old_git_is_named(make_repo, tmp_path):
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "git"
    stand_in.write_text(OLD.format(git=shutil.which("git")))
    stand_in.chmod(0o755)
    repo, env = make_repo(), {"PATH": f"{stand_in.parent}:{CLEAN['PATH']}"}
    repo.join("ada", env=env)
    text = error_line(repo.run("conflicts", env=env))
    assert "2.30.9" in text and "2.38" in text
    assert "ada" in repo.ok("overview", env=env), "nothing else needs it"


def test_the_command(two):
    repo, one, other = two
    assert "session" in repo.ok("conflicts")
    repo.join("ada", "planner")
    one.join("bob", "implementer")
    other.join("eve", "tester")
    assert repo.ok("conflicts") == "All 3 pairs merge. All 3 worktrees merge with main.\n"
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\n")
    (other.path / "esc\x1b[2J").write_text("")
    (one.path / "esc\x1b[2J").mkdir()
    (one.path / "esc\x1b[2J" / "x").write_text("")
    text = repo.ok("conflicts", "@eve")
    assert text == ("@bob ✗ @eve\n  a.txt       line 10\n  esc\\x1b[2J  file/directory\n\n"
                    "1 of 2 pairs would not merge. The worktree merges with main.\n")
    report = other.json("conflicts")
    shaped(report, "Conflicts")
    pair = next(row for row in report["pairs"] if not row["clean"])
    assert pair["agents"] == [["bob"], ["eve"]] and pair["branches"] == ["one", "two"]
    assert pair["worktree_paths"] == [str(one.path), str(other.path)] and pair["files"][0]["ranges"] == [[[10, 10]], [[10, 10]]]
    assert [row["base_branch"] for row in report["base"]] == ["main"] * 3
    assert report["skipped"] == report["errors"] == [] and report["checked_at"]
    one.ok("session", "end")
    assert [row["agents"] for row in repo.json("conflicts")["pairs"]] == [[["ada"], ["eve"]]]
    assert len(repo.json("conflicts", "--all")["pairs"]) == 3
    assert "@bob" in error_line(repo.run("conflicts", "bob")) and "@nobody" in error_line(repo.run("conflicts", "nobody"))
    repo.ok("daemon", "stop")
    assert not (repo.var / "conflicts").exists()


# ---- what agents are told

LOOKING = """
import asyncio
made = thrum.Daemon.__init__
def make(self, *args):
    made(self, *args)
    async def look():       # one that has begun goes on until it has seen this, too
        self.worktrees_changed()
        await self._looking
    thrum.METHODS["look"] = thrum.Method(
        lambda context, params: asyncio.run_coroutine_threadsafe(look(), self.loop).result(30) is None, {}, "Look.")
thrum.Daemon.__init__, thrum.LOOK_S = make, 0
"""


def test_both_are_told_once_when_it_appears_and_when_it_is_gone(two, foreground):  # noqa: F811
    repo, one, other = two

    def told(client):
        """What both have been told after one more look, the oldest first."""
        assert client.call("look") is True
        found = [[message["body"]["content"] for message in client.call(
            "message.list", for_agent=agent, author_id="thrum", sort_order="asc")["messages"]] for agent in ("ada", "bob", "eve")]
        assert [text.replace("@bob and @ada", "@ada and @bob") for text in found[1]] == found[0] and found[2] == []
        return found[0]

    process = foreground(repo, LOOKING)
    one.join("bob", "implementer")
    other.join("ada", "tester")
    repo.join("eve", "planner")
    with repo.client() as client:
        assert told(client) == []
        edit(one, 10, "ten\n")
        edit(other, 10, "dix\n")
        appeared, = told(client)
        assert appeared == ("The work of @ada and @bob would not merge as it stands:\n- a.txt: line 10\n"
                            "Agree on who changes what; `thrum conflicts` shows how it stands.")
        edit(other, 11, "onze\n")
        assert told(client) == [appeared], "it is the same file"
        for worktree in (one, other):
            (worktree.path / "new").write_text(worktree.path.name + "\n")
        joined = told(client)[1]
        assert joined.startswith("The work of @ada and @bob would not merge in more files now:\n- new: line 1\n")
        (other.path / "new").unlink()
        assert told(client) == [appeared, joined]
    for damage in ("", "rm"):
        process.terminate()
        process.wait(END_S)
        for suffix in ("", "-wal", "-shm"):         # made anew from the journal
            if damage and os.path.exists(f"{repo.var}/messages.db{suffix}"):
                os.unlink(f"{repo.var}/messages.db{suffix}")
        process = foreground(repo, LOOKING)
        with repo.client() as client:
            assert told(client) == [appeared, joined]
    with repo.client() as client:
        (other.path / "a.txt").write_text((one.path / "a.txt").read_text())
        gone = "The work of @ada and @bob would merge again: the conflict is gone."
        assert told(client) == told(client) == [appeared, joined, gone]
        edit(other, 10, "zehn\n")
        assert told(client) == [appeared, joined, gone, appeared]
        assert client.call("message.list", author_id="thrum")["total"] == 8
        one.ok("session", "end")
        edit(other, 10, "ten\n")
        assert told(client) == [appeared, joined, gone, appeared], "who is not here is not told"


def test_looks_are_half_a_minute_apart(two, world, monkeypatch):
    """However often it is asked; the clock and the sleep are the test's."""
    daemon = thrum.Daemon(thrum.find_places(str(two[0].path)), world, {})
    at, looks, slept = [1000.0], [], []
    world.monotonic = lambda: at[0]

    async def read(handler, params, slow=False):
        assert handler is thrum.conflict_news and slow is thrum.ONE_BY_ONE
        looks.append(at[0])
        return []

    sleep = asyncio.sleep

    async def pass_time(seconds):
        slept.append(seconds)
        if len(slept) == 1:
            daemon.worktrees_changed()      # while it waits
        await sleep(0)
        at[0] += seconds

    async def run():
        daemon.loop, daemon._read = asyncio.get_running_loop(), read
        for _ in range(3):
            for _ in range(5):
                daemon.worktrees_changed()
            while not daemon._looking.done():
                await sleep(0)
        daemon._looking = None
        daemon.worktrees_changed()
        await sleep(0)
        daemon._looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await daemon._looking

    monkeypatch.setattr(asyncio, "sleep", pass_time)
    asyncio.run(run())
    assert len(looks) >= 3 and looks[0] == 1000 and {b - a for a, b in zip(looks, looks[1:])} == {thrum.LOOK_S}


@pytest.mark.parametrize("ranges, text", [
    ([[[10, 14]], [[12, 16]]], "lines 10-14 (@ada); 12-16 (@bob)"), ([[[3, 3]], [[3, 3]]], "line 3"),
    ([[[3, 2]], [[1, 1]]], "lines after 2 (@ada); 1 (@bob)"),
    ([[[n, n] for n in range(1, 8)]] * 2, "lines 1, 2, 3, 4, 5 and 2 more")])
def test_how_lines_are_written(ranges, text):
    assert thrum.conflict_text({"kind": "contents", "ranges": ranges}, ["@ada", "@bob"]) == text


def test_how_other_conflicts_are_written():
    assert thrum.conflict_text({"kind": "rename/rename", "names": ["b", "c\n"]}, []) == "rename/rename (b, c?)"


@pytest.fixture
def at_work(two):
    """`join(name, worktree)` for sessions in a ledger without a daemon, and the context that it has."""
    repo = two[0]
    ledger = thrum.Ledger(thrum.find_places(str(repo.path)), world := thrum.World({}))
    ledger.open("r_0123456789AB")

    def join(name, worktree):
        def change(context):
            thrum.agent_register(context, {"name": name, "role": "r" + name[:9], "module": "core"})
            thrum.session_start(context, {"agent_id": name, "refs": [{"type": "worktree", "value": str(worktree)}]})
        assert ledger.commit([change])[0] == [None]
    yield join, thrum.Context(world, ledger.store, ledger)
    ledger.close()


def tell(context):
    """Look, and tell what is new: the texts of those messages by their receiver."""
    news = thrum.conflict_news(context, {})
    assert context.ledger.commit([lambda context: thrum.tell_of_conflicts(context, news)])[0] == [None]
    told = context.store.page(author="thrum", limit=len(news))["messages"] if news else []
    return {agent_id: text for (agent_id,), text, *_ in news}, told


def test_what_is_known_is_told_without_git(two, at_work, monkeypatch):
    repo, one, other = two
    join, context = at_work
    join("bob", one.path)
    join("ada", other.path)
    assert thrum.known_conflicts(context) == {}
    edit(one, 10, "ten\n")
    edit(other, 10, "dix\nonze\n")
    assert set(tell(context)[0]) == {"ada", "bob"}
    monkeypatch.setattr(thrum.Git, "run", None)
    files, turned = ([{"path": "a.txt", "kind": "contents", "ranges": ranges}] for ranges in (
        [[[10, 10]], [[10, 11]]], [[[10, 11]], [[10, 10]]]))
    assert thrum.known_conflicts(context) == {"bob": [{"with": "ada", "files": files}], "ada": [{"with": "bob", "files": turned}]}


def test_one_message_tells_an_agent_of_all_others(two, at_work, monkeypatch):
    """Each pair is told of once, whatever the message holds besides; very many files and agents fit, too."""
    join, context = at_work
    names = [f"{number:02}" + "x" * (thrum.NAME_MAX - 2) for number in range(20)]
    tops = {name: str(two[0].worktree(f"w{name[:2]}").path) for name in names}
    for name, top in tops.items():
        join(name, top)
    found = {}
    monkeypatch.setattr(thrum.Conflicts, "look", lambda *_: ({}, dict(found), {}))

    def conflict(a, b, *paths):
        found[tops[names[a]], tops[names[b]]] = [{"path": path, "kind": "binary"} for path in paths]
    assert tell(context) == ({}, [])
    for b in range(1, 20):
        conflict(0, b, "x\x1b" if b > 1 else "y")
    news, told = tell(context)
    assert len(news) == len(told) == 20 and tell(context) == ({}, [])
    five = [", ".join(f"@{name}" for name in names[first:first + 5]) for first in range(3)]
    assert news[names[0]] == (f"The work of @{names[0]} and {five[1]} and 14 more would not merge as it stands:\n"
                              f"- y: with @{names[1]}\n- x?: with {five[2]} and 13 more\n"
                              "Agree on who changes what; `thrum conflicts` shows how it stands.")
    assert news[names[2]].startswith(f"The work of @{names[2]} and @{names[0]} would not merge as it stands:\n- x?: binary\n")
    conflict(0, 1, "y", "z")
    conflict(0, 2)
    conflict(3, 4, "new")
    news, told = tell(context)
    assert set(news) == set(names[:5]) and tell(context) == ({}, [])
    assert news[names[0]] == (f"The work of @{names[0]} and @{names[1]} would not merge in more files now:\n- z: binary\n"
                              "Agree on who changes what; `thrum conflicts` shows how it stands.\n"
                              f"The work of @{names[0]} and @{names[2]} would merge again: the conflict is gone.")
    conflict(0, 2, "x")
    assert set(tell(context)[0]) == {names[0], names[2]}, "it came back"
    # Nothing of this is kept anywhere but in the messages.
    found.update({pair: [{"path": f"{number:04}" + '\\"\x01' * 50, "kind": "binary"} for number in range(2000)] for pair in found})
    assert len(tell(context)[0]) == 20 and tell(context) == ({}, [])
    monkeypatch.setattr(thrum, "NOTICE_PAIRS", 12)
    for b in range(1, 20):
        conflict(0, b)
    assert len(tell(context)[0]) == 20 and set(tell(context)[0]) == {names[0]} and tell(context) == ({}, []), "the rest comes next"


def test_an_agent_in_two_worktrees_is_told_once(two, at_work):
    repo, one, other = two
    join, context = at_work
    join("ada", repo.path)
    join("bob", one.path)
    join("bob", other.path)
    edit(repo, 10, "ten\n")
    edit(one, 10, "dix\n")
    edit(other, 10, "zehn\n")
    assert set(tell(context)[0]) == {"ada", "bob"} and tell(context) == ({}, [])


def test_looks_that_wait_for_each_other_keep_nobody_else_waiting(two, foreground):  # noqa: F811
    repo, one, _ = two
    (come, ready), (gate, opened) = pipes = os.pipe(), os.pipe()
    process = foreground(repo, f"""
look, read = thrum.Conflicts.look, thrum.Daemon._read
def slow(self, *args):
    with self._lock:
        os.write({ready}, b"i")
        os.read({gate}, 1)
    return look(self, *args)
def noted(self, handler, *args, **more):
    if handler is thrum.conflict_list:
        os.write({ready}, b".")
    return read(self, handler, *args, **more)
thrum.Conflicts.look, thrum.Daemon._read = slow, noted
""", pass_fds=(ready, gate))
    one.join("bob", "implementer")
    looks = [subprocess.Popen([*repo.command(), "conflicts"], cwd=repo.path, env=CLEAN, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        assert sorted(os.read(come, 1) for _ in range(4)) == [b".", b".", b".", b"i"], "all have come, and one looks"
        for number in range(3):
            one.ok("session", "heartbeat", timeout=END_S)
            os.write(opened, b"x")
            assert number == 2 or os.read(come, 1) == b"i"
        assert [look.wait(END_S) for look in looks] == [0] * 3 and process.poll() is None
    finally:
        for look in looks:
            look.kill()
            look.communicate()
        for descriptor in (*pipes[0], *pipes[1]):
            os.close(descriptor)
