"""How long the end of training waits, by a clock of the test's own."""

from trainctl.trainer.patience import LAST_S, LIMIT_S, SILENT_S, Patience


def test_a_hub_that_is_silent_is_waited_for_three_seconds_and_one_that_answers_up_to_the_limit() -> None:
    patience = Patience(100.0)
    assert patience.with_hub(100.0, 7, asked=True)
    assert patience.with_hub(99.9 + SILENT_S, 7, asked=True)
    assert not patience.with_hub(100.1 + SILENT_S, 7, asked=True)
    answering = Patience(100.0)
    assert all(answering.with_hub(100.0 + second, second, asked=True) for second in range(10))
    assert not answering.with_hub(100.0 + LIMIT_S, 10, asked=True)


def test_a_hub_that_owes_nothing_is_not_called_silent() -> None:
    patience = Patience(0.0)
    assert all(patience.with_hub(float(second), 7, asked=False) for second in range(10))
    assert not patience.with_hub(LIMIT_S, 7, asked=False), "one that never starts"


def test_a_device_is_waited_for_while_it_brings_something_and_leaves_the_hub_its_time() -> None:
    patience = Patience(0.0)
    assert patience.with_device(0.0, 50)
    assert patience.with_device(SILENT_S - 0.1, 50)
    assert patience.with_device(SILENT_S + 0.1, 49), "one value came"
    assert not patience.with_device(2 * SILENT_S + 0.2, 49)
    slow = Patience(0.0)
    assert all(slow.with_device(float(second), 100 - second) for second in range(int(LIMIT_S - LAST_S)))
    assert not slow.with_device(LIMIT_S - LAST_S, 1)


def test_behind_a_device_that_was_given_up_a_hub_is_waited_for_less() -> None:
    patience = Patience(0.0)
    patience.with_device(0.0, 5)
    assert patience.with_hub(SILENT_S, 7, asked=False)
    assert not patience.with_device(SILENT_S, 5)
    assert patience.with_hub(SILENT_S + LAST_S - 0.1, 7, asked=True)
    assert not patience.with_hub(SILENT_S + LAST_S + 0.1, 7, asked=True)
