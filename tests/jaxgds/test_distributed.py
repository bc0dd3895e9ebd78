"""`fail_together` in one process; with two: tests/examples/test_serve_two_processes.py."""

import threading
from unittest import mock

import pytest
from jax._src import distributed

import jaxgds


def test_alone_it_does_nothing():
    before = threading.active_count()
    with jaxgds.fail_together():
        assert threading.active_count() == before
    with pytest.raises(KeyError, match="mine"), jaxgds.fail_together():
        raise KeyError("mine")


def test_it_says_where_it_has_to_be_entered():
    caught = []

    def enter():
        try:
            with jaxgds.fail_together():
                pass
        except RuntimeError as e:
            caught.append(str(e))

    several = distributed.State()
    several.client, several.num_processes = object(), 2
    with mock.patch.object(distributed, "global_state", several):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert "main thread" in caught[0]
