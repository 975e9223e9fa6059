"""What pytest loads wherever this project is installed: nothing, unless the kit is what it is asked to run.

Owns: that decision. Must never import torch or the kit itself before it is made. It exists because pytest does not
load the conftest of a package named with --pyargs before it parses options.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

KIT = "graphs.conformance"


def pytest_load_initial_conftests(early_config: pytest.Config, args: Sequence[str]) -> None:
    """Bring in the kit's options and fixtures when an argument names the kit."""
    if any(KIT in argument.replace("/", ".") for argument in args):
        early_config.pluginmanager.import_plugin(f"{KIT}.plugin")
