"""Signals are remembered, and only while somebody listens."""

import os
import signal
import threading

import pytest

from segfit.system.process import StopSignal


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_is_remembered_and_the_handler_goes_back(number, reason):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == reason
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_is_not_held_back():
    before = signal.getsignal(signal.SIGINT)  # not always Python's: a background job ignores it
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_sigterm_is_the_first_once_more():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "terminated"


def test_a_thread_may_train_without_signals():
    seen = []

    def listen() -> None:
        with StopSignal() as stop:
            seen.append(stop.reason)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="not on Windows")
@pytest.mark.parametrize(("nohup", "reason"), [(False, "terminated"), (True, None)])
def test_a_closed_terminal_ends_a_training_unless_nohup_was_typed(nohup, reason):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason == reason
    finally:
        signal.signal(signal.SIGHUP, before)
