"""Messages of `CloraError`."""

from __future__ import annotations

import pytest

from clora.errors import MAX_MESSAGE, CloraError, about


def test_a_message_is_shown_whole():
    assert str(CloraError("a" * MAX_MESSAGE)) == "a" * MAX_MESSAGE


def test_of_an_endless_value_the_middle_is_left_out():
    with pytest.raises(CloraError) as caught, about("train.updates"):
        raise CloraError(f"found {'x' * 10**6}; expected less")
    message = str(caught.value)
    assert len(message) < MAX_MESSAGE + 100
    assert message.startswith("train.updates: found xxx")
    assert message.endswith("xxx; expected less")
