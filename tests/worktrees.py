"""Trees of files for the tests of conflicts, all from a seed: a base and what two people make of it.

A tree is {path: (mode, content)}, all bytes but the mode.  `commit_pairs` puts many of them into one repository with one
process, `lay_out` writes one into a worktree.
"""

import os
import random
import shutil
import subprocess

from conftest import CLEAN

LINK, FILE, PROGRAM = "120000", "100644", "100755"
NAMES = (b"a.txt", b"b.py", b"with space", b'quo"te', b"new\nline", b"tab\there", "naïve-漢字".encode(),
         b"latin-\xe9", b"-dash", b"back\\slash", b"src/core", b"src/lexer.c", b"src/deep/er/x", b"docs/read me.md",
         b":(glob)*", b"data.bin", b"empty", b"d", b"d/inner", b"~tilde~1")


class Author:
    """Makes and changes trees at random; nearly all lines that it writes are different."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.count = 0

    def line(self):
        if self.rng.random() < 0.05:
            return self.rng.choice((b"", b"}", b"=======", b"<<<<<<< HEAD", b"    return"))
        self.count += 1
        return b"line %d of %s" % (self.count, self.rng.choice((b"code", b"prose", "größe".encode())))

    def text(self, lines):
        end = self.rng.choice((b"\n", b"\n", b"\n", b"\r\n"))
        return end.join(lines) + (end if lines and self.rng.random() < 0.85 else b"")

    def file(self):
        rng = self.rng
        kind = rng.random()
        if kind < 0.1:
            return rng.choice((FILE, PROGRAM)), b"\0" + bytes(rng.randrange(256) for _ in range(40))
        if kind < 0.15:
            return LINK, rng.choice((b"a.txt", b"src", b"nowhere", b"d/inner"))
        if kind < 0.2:
            return FILE, b""
        return rng.choice((FILE, FILE, FILE, PROGRAM)), self.text([self.line() for _ in range(rng.choice((1, 3, 8, 20, 60)))])

    def put(self, tree, path, file):
        """Add a file; what is in its way goes."""
        for other in list(tree):
            if other.startswith(path + b"/") or path.startswith(other + b"/"):
                del tree[other]
        tree[path] = file

    def base(self):
        tree = {}
        for path in self.rng.sample(NAMES, self.rng.randrange(3, 14)):
            self.put(tree, path, self.file())
        return tree

    def edited(self, content):
        rng, lines = self.rng, content.splitlines(keepends=True)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(lines) + 1)
            size = rng.choice((0, 0, 1, 1, 2, 5))
            end = b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"
            lines[at:at + size] = [self.line() + end for _ in range(rng.choice((0, 1, 1, 2, 6)))]
        return b"".join(lines) if rng.random() < 0.9 else b"".join(lines).rstrip(b"\r\n")

    def changed(self, tree):
        rng, tree = self.rng, dict(tree)
        for _ in range(rng.choice((1, 2, 3, 5))):
            path = rng.choice(sorted(tree)[:rng.choice((3, 99))]) if tree else b""      # often both change the same
            act = rng.random() if path else 1
            if act < 0.5:
                mode, content = tree[path]
                tree[path] = (mode, self.edited(content)) if mode != LINK and b"\0" not in content else self.file()
            elif act < 0.6:
                del tree[path]
            elif act < 0.75:
                file = tree.pop(path)
                if rng.random() < 0.5 and file[0] != LINK and b"\0" not in file[1]:
                    file = file[0], self.edited(file[1])
                self.put(tree, rng.choice((b"moved", b"other/moved", b"src/moved", path + b".bak", rng.choice(NAMES))), file)
            elif act < 0.8 and tree[path][0] != LINK:
                tree[path] = {FILE: PROGRAM, PROGRAM: FILE}[tree[path][0]], tree[path][1]
            elif act < 0.85:    # a folder where a file was
                self.put(tree, path + b"/now a folder", self.file())
            else:
                self.put(tree, rng.choice(NAMES), self.file())
        return tree


def quoted(path):
    """A path as fast-import wants it."""
    return b'"' + b"".join(b"\\%03o" % byte if byte < 32 or byte > 126 or byte in b'"\\' else bytes([byte]) for byte in path) + b'"'


def commit_pairs(top, seeds):
    """Make a base and two commits for each seed; gives [(base, ours, theirs)] of ids and [(base, ours, theirs)] of trees."""
    stream, mark, trees = [], 0, []
    for seed in seeds:
        author = Author(seed)
        base = author.base()
        trees.append((base, author.changed(base), author.changed(base)))
        for tree, parent in zip(trees[-1], (0, mark + 1, mark + 1)):
            mark += 1
            stream.append(b"commit refs/heads/c%d\nmark :%d\ncommitter T <t@localhost> 1700000000 +0000\ndata 0\n" % (mark, mark))
            stream.append(b"from :%d\n" % parent if parent else b"")
            stream.append(b"deleteall\n")
            for path, (mode, content) in tree.items():
                stream.append(b"M %s inline %s\ndata %d\n%s\n" % (mode.encode(), quoted(path), len(content), content))
    marks = os.path.join(top, ".git", "marks")
    subprocess.run(["git", "fast-import", "--quiet", f"--export-marks={marks}"], cwd=top, input=b"".join(stream), env=CLEAN, check=True)
    with open(marks) as file:
        ids = dict(line.split() for line in file)
    os.unlink(marks)
    names = [ids[f":{number}"] for number in range(1, mark + 1)]
    return list(zip(names[::3], names[1::3], names[2::3])), trees


def lay_out(top, tree):
    """Make the files of a worktree those of a tree, whatever the index says."""
    for name in os.listdir(os.fsencode(top)):
        path = os.path.join(os.fsencode(top), name)
        if name not in (b".git", b".thrum"):
            shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
    for path, (mode, content) in tree.items():
        path = os.path.join(os.fsencode(top), path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if mode == LINK:
            os.symlink(content, path)
            continue
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o755 if mode == PROGRAM else 0o644)
