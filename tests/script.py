"""Runs thrum.py as `python THRUM.PY …` does, but from the bytecode that importing it has left: a script is compiled at each start,
for half a second.

    python tests/script.py THRUM.PY [ARGUMENT …]
"""

import os
import sys
from importlib.machinery import SourceFileLoader

del sys.argv[0]
__file__ = sys.argv[0]
__loader__ = SourceFileLoader("__main__", __file__)
sys.path[0] = os.path.dirname(__file__)
exec(__loader__.get_code("__main__"))       # here, so that this is the module
