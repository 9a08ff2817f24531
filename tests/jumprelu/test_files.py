"""Files: locks between real processes."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest

from jumprelu.files import locked


def hold(folder, entered, leave, waited):
    with locked(folder):
        entered.set()
        waited.value = time.time()
        leave.wait(60)


@pytest.fixture
def start():
    context, processes = multiprocessing.get_context("fork"), []

    def start(folder):
        entered, leave, at = context.Event(), context.Event(), context.Value("d", 0.0)
        process = context.Process(target=hold, args=(folder, entered, leave, at))
        process.start()
        processes.append(process)
        return process, entered, leave

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_a_folder_is_locked_by_one_process_at_a_time(start, tmp_path):
    folder = tmp_path / "new"
    _, first, leave = start(folder)
    assert first.wait(30)
    _, second, _ = start(folder)
    _, elsewhere, _ = start(tmp_path / "other")
    assert elsewhere.wait(30) and not second.wait(0.3)
    leave.set()
    assert second.wait(30)


def test_who_waits_says_so_and_a_killed_process_holds_nothing(start, tmp_path, caplog):
    process, entered, _ = start(tmp_path)
    assert entered.wait(30)
    context = multiprocessing.get_context("fork")
    killer = context.Process(target=kill_later, args=(process.pid,))
    killer.start()
    with locked(tmp_path, "a neighbour works"):
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
    killer.join()
    [record] = caplog.records
    assert record.message.startswith("a neighbour works (an interrupt")


def kill_later(pid):
    import os

    time.sleep(0.5)
    os.kill(pid, signal.SIGKILL)


def test_an_error_within_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass
