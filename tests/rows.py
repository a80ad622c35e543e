"""Which test proves which row of the specifications: the check of the tables in test_contract_rpc.py and test_contract_cli.py."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent


@functools.cache
def tests_in(module):
    """The names of the test functions of a file here."""
    path = TESTS / (module + ".py")
    if not path.exists():
        return frozenset()
    return frozenset(node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                     if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def unproved(rows, module):
    """The rows whose proof is none: no `test_x` of the module, no `file.test_x`, and no `decision N` that overrules the row."""
    wrong = []
    for row, proofs in rows.items():
        for proof in proofs.split(", "):
            file, _, name = proof.rpartition(".")
            if not re.fullmatch(r"(decision ([1-9]|[12]\d)|design \d+|issue: .+)", proof) and name not in tests_in(file or module):
                wrong.append(f"{row}: {proof}")
    return wrong
