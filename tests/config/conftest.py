"""Loads configs that are written by a test."""

from __future__ import annotations

import pytest
from helpers.configs import TEXT

from clora.config.settings import load_config


@pytest.fixture
def load(tmp_path):
    """Returns load(*overrides, text=TEXT)."""

    def run(*overrides, text=TEXT):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_config(path, overrides)

    return run
