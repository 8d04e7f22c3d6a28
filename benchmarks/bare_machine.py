"""Importing this lets the training loop be imported where what it reads text and files with is not installed.

A step of training uses none of it. Whatever is imported from a missing module is an empty class, and so are its attributes.
"""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

from benchmarks.harness import READERS

MISSING = [name for name in READERS if find_spec(name) is None]


class Empty(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return empty(name)


def empty(name: str) -> Empty:
    return Empty(name, (Exception,), {})


class Finder:
    """Finds and makes the missing modules, and those inside of them."""

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in MISSING else None

    def create_module(self, spec):
        return None  # an ordinary module

    def exec_module(self, module):
        module.__getattr__ = partial(getattr, empty(module.__name__))


sys.meta_path.append(Finder())
