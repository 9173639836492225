"""What is registered works with what was loaded before, or a warning says that it may not."""

import sys
import types
import warnings

import pytest

from medct.publishing.registration import register


def test_code_of_a_repository_in_the_same_process_is_warned_of(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
    name = "transformers_modules.org.base.commit.configuration_medct"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.warns(UserWarning, match="Load them again, or import medct first"):
        register()
