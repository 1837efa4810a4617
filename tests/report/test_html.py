"""Pages of reports: nothing from the input is taken as markup, and numbers are plain JSON."""

from __future__ import annotations

import jinja2
import numpy as np
import pytest
import torch

from clora.report import html
from clora.report.html import data_uri, embedded_curves, plain_json, render_page


def test_values_are_escaped_and_none_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "TEMPLATES", tmp_path)
    (tmp_path / "page.html.j2").write_text("<p>{{ name }}</p>")
    assert render_page("page.html.j2", name="a<b>&c") == "<p>a&lt;b&gt;&amp;c</p>"
    with pytest.raises(jinja2.UndefinedError, match="'name' is undefined"):
        render_page("page.html.j2")


def test_curves_without_a_finite_value_are_left_out():
    curves = {"dmd_bs": [(0, 1.0), (1, float("nan"))], "empty": [], "diverged": [(0, float("inf"))]}
    ((name, picture),) = embedded_curves(curves)
    assert name == "dmd bs"
    assert picture.startswith("data:image/png;base64,")
    assert data_uri(b"\x00\x01") == "data:image/png;base64,AAE="


def test_scalars_become_numbers_and_what_is_not_finite_null():
    values = {1: np.float32(0.5), "tensor": torch.tensor(2), "pair": (float("inf"), "text"), "none": None}
    assert plain_json(values) == {"1": 0.5, "tensor": 2, "pair": [None, "text"], "none": None}
