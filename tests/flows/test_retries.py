"""What the driver submits again: all that a lost worker had to do, with half in memory where that ran out."""

from types import SimpleNamespace

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from flows.driver import Driver, SubmittedAnalysis, Trainer
from tasks.events import Published
from tasks.jobs import Attempt, CurvatureJob

LOST = [(OutOfMemoryError("killed by the memory monitor"), 2), (WorkerCrashedError(), 1)]


@pytest.fixture
def driver():
    """One that keeps what it would submit."""
    driver = object.__new__(Driver)
    driver.submitted = []
    driver._start_analysis = driver._start_trainer = driver.submitted.append
    return driver


@pytest.mark.parametrize(("error", "halvings"), LOST)
def test_an_analysis_is_tried_again(driver, error, halvings):
    job = CurvatureJob(None, None, 0, "key", Attempt(halvings=1))
    driver._end_analysis(SubmittedAnalysis(job), error)
    (again,) = driver.submitted
    assert (again.key, again.attempt.number, again.attempt.halvings) == ("key", 2, halvings)


@pytest.mark.parametrize(("error", "halvings"), LOST)
def test_a_training_is_tried_again(driver, error, halvings):
    driver._retry_or_fail_training(Trainer("plan", None, Attempt(halvings=1)), error)
    (again,) = driver.submitted
    assert (again.plan, again.attempt.number, again.attempt.halvings) == ("plan", 2, halvings)


def test_a_training_is_given_up_after_four_tries_without_a_further_checkpoint(driver):
    failed = []
    driver.ledger = SimpleNamespace(
        checkpoint_trained=lambda: None,
        next_jobs=lambda plan, step: [],
        training_failed=lambda plan, attempt, *words: failed.append(attempt.number),
    )
    trainer = Trainer("plan", None, Attempt())
    for step in (0, 5, 5, 12):  # the third try replays the checkpoint that was there
        driver.trainers = {"stream": trainer}
        driver._receive_training("stream", Published("pack", step, 1, None))
        driver._retry_or_fail_training(trainer, WorkerCrashedError())
        trainer = driver.submitted[-1]
    assert (trainer.attempt.number, trainer.fruitless) == (5, 1)
    for _ in range(2):
        driver._retry_or_fail_training(trainer, WorkerCrashedError())
        trainer = driver.submitted[-1]
    assert (trainer.attempt.number, failed) == (7, [])
    driver._retry_or_fail_training(trainer, WorkerCrashedError())
    assert failed == [7]
