"""Requests to stop: which end a run at once, which let it finish a step, and what they leave behind."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from clora.stopping import Stopped, StopRequest, stop_requests

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
NUMBERS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def send(number):
    os.kill(os.getpid(), number)


def code_of(raised):
    return 130 if raised.type is KeyboardInterrupt else raised.value.code


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_stops_at_once_or_after_the_step(number):
    before = signal.getsignal(number)
    with stop_requests(None) as stop:
        with pytest.raises((KeyboardInterrupt, Stopped)) as raised:
            send(number)
        assert code_of(raised) == NUMBERS[number]
    with stop_requests(None) as stop:
        done = []
        with pytest.raises((KeyboardInterrupt, Stopped)) as raised, stop.gently():  # noqa: PT012
            assert not stop.is_requested
            send(number)
            assert stop.is_requested
            if number != signal.SIGINT:
                send(number)  # schedulers repeat theirs
            done.append(number)
        assert done == [number]
        assert code_of(raised) == NUMBERS[number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", NUMBERS)
def test_ctrl_c_after_a_request_stops_at_once(first):
    passed = []
    with stop_requests(None) as stop, pytest.raises(KeyboardInterrupt), stop.gently():  # noqa: PT012
        send(first)
        passed.append(1)
        send(signal.SIGINT)
        passed.append(2)
    assert passed == [1]


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stop_requests(None) as stop:
            send(signal.SIGHUP)
            assert not stop.is_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_limit():
    with stop_requests(0.05) as stop:
        with pytest.raises(Stopped) as raised, stop.gently():  # noqa: PT012
            time.sleep(0.1)
            assert stop.is_requested
        assert raised.value.code == 75
    with pytest.raises(Stopped), stop_requests(0.05):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not StopRequest().is_requested


def test_another_thread_notices_only_the_time_limit():
    found = []

    def run():
        with stop_requests(0.01) as stop:
            found.append(stop.is_requested)
            time.sleep(0.05)
            found.append(stop.is_requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, True]
