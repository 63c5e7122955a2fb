"""Functions and classes named by a text, ``module:name``, so that a registry of names loads nothing heavy."""

import importlib
from typing import Any


def resolve(reference: str) -> Any:
    """What a text such as ``lossray.networks.mlp:build_mlp`` names; its module is imported now.

    For our own registries. Functions of the user's are loaded by `lossray.plugins.load`.
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
