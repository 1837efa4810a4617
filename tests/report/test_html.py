"""Pages of reports: nothing from the input is taken as markup, and numbers are plain JSON."""

from __future__ import annotations

import jinja2
import numpy as np
import pytest
import torch

from clora.report import html
from clora.report.html import data_uri, plain_json, render_page


def test_values_are_escaped_and_none_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "TEMPLATES", tmp_path)
    (tmp_path / "page.html.j2").write_text("<p>{{ name }}</p>")
    assert render_page("page.html.j2", name="a<b>&c") == "<p>a&lt;b&gt;&amp;c</p>"
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        render_page("page.html.j2")


def test_a_picture_is_an_address_in_the_page():
    assert data_uri(b"\x00\x01") == "data:image/png;base64,AAE="


def test_scalars_become_numbers_and_what_is_not_finite_null():
    values = {1: np.float32(0.5), "tensor": torch.tensor(2), "pair": (float("inf"), "text"), "none": None}
    assert plain_json(values) == {"1": 0.5, "tensor": 2, "pair": [None, "text"], "none": None}
