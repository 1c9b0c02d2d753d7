"""When trainings start by themselves: occurrences of a schedule, clocks that jump, drift."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from lifecycle.conftest import SLEEP, Make
from wire import wait_until

from tuneserve.errors import SettingsError
from tuneserve.lifecycle.retraining import DRIFT_PAUSE, Retraining, Schedule
from tuneserve.settings import Settings

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "schedule.json"


def hourly(memory: Path, **options: float) -> Schedule:
    return Schedule("30 * * * *", "UTC", **{"jitter_s": 0, **options}, memory=memory)


def test_a_new_schedule_has_missed_nothing(memory: Path) -> None:
    schedule = hourly(memory)
    assert not schedule.due(NOON)
    assert not schedule.due(NOON + timedelta(minutes=29))
    assert schedule.due(NOON + timedelta(minutes=30))


def test_an_occurrence_is_due_until_it_is_marked_and_never_again(memory: Path) -> None:
    schedule = hourly(memory)
    schedule.due(NOON)
    for _ in range(2):
        assert schedule.due(NOON + HOUR)
    schedule.mark(NOON + HOUR)
    assert not schedule.due(NOON + HOUR)
    assert schedule.due(NOON + 2 * HOUR)


def test_what_a_stopped_container_missed_is_caught_up_once(memory: Path) -> None:
    hourly(memory).due(NOON)
    later = hourly(memory)
    assert later.due(NOON + 9 * HOUR)
    later.mark(NOON + 9 * HOUR)
    assert not hourly(memory).due(NOON + 9 * HOUR)


def test_another_schedule_has_missed_nothing(memory: Path) -> None:
    hourly(memory).due(NOON)
    assert not Schedule("0 * * * *", "UTC", jitter_s=0, memory=memory).due(NOON + 9 * HOUR)


def test_a_clock_that_goes_back_a_little_repeats_nothing(memory: Path) -> None:
    schedule = hourly(memory)
    schedule.due(NOON)
    schedule.mark(NOON + HOUR)
    schedule.mark(NOON)
    assert not schedule.due(NOON + timedelta(minutes=31))


def test_a_clock_that_was_far_ahead_does_not_silence_the_schedule(memory: Path) -> None:
    schedule = hourly(memory)
    schedule.due(NOON)
    schedule.mark(NOON + 9999 * HOUR)
    assert not schedule.due(NOON)
    assert schedule.due(NOON + HOUR)


@pytest.mark.parametrize(("month", "day"), [(3, 29), (10, 25)])
def test_the_hour_that_is_skipped_or_repeated_brings_one_occurrence(memory: Path, month: int, day: int) -> None:
    schedule = Schedule("30 2 * * *", "Europe/Berlin", jitter_s=0, memory=memory)
    first = schedule.next(datetime(2026, month, day - 1, 12, tzinfo=UTC))
    second = schedule.next(first)
    assert first.date() == datetime(2026, month, day).date()
    assert second.date() == datetime(2026, month, day + 1).date()


def test_the_time_zone_is_the_one_that_is_named(memory: Path) -> None:
    schedule = Schedule("0 3 * * *", "America/New_York", jitter_s=0, memory=memory)
    assert schedule.next(NOON) == datetime(2026, 3, 3, 8, 0, tzinfo=UTC)


def test_jitter_puts_off_by_no_more_than_it_says_and_differs_by_host(memory: Path) -> None:
    delays = set()
    for host in "abcdef":
        schedule = Schedule("0 * * * *", "UTC", jitter_s=600, memory=memory.with_name(host), host=host)
        schedule.due(NOON)
        delays.add(next(minute for minute in range(600) if schedule.due(NOON + timedelta(minutes=minute))) - 60)
    assert 0 <= min(delays) < max(delays) <= 10


def test_a_damaged_memory_is_a_first_start(memory: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory.write_text("{")
    assert not hourly(memory).due(NOON)
    assert "starts over" in caplog.text
    assert json.loads(memory.read_text())["handled"] == NOON.isoformat()


def test_a_memory_that_cannot_be_written_is_said_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = hourly(tmp_path / "none" / "schedule.json")
    assert not schedule.due(NOON)
    assert schedule.due(NOON + HOUR)
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RETRAIN_SCHEDULE", "soon"),
        ("RETRAIN_SCHEDULE", "61 * * * *"),
        ("RETRAIN_SCHEDULE", "* * * * * *"),
        ("RETRAIN_TIME_ZONE", "Mars/Base"),
        ("RETRAIN_TIME_ZONE", "../etc"),
    ],
)
def test_what_cron_does_not_understand_is_refused_at_once(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"{variable}='.+' is not"):
        Settings.from_environ({variable: value})


def test_the_schedule_and_drift_start_trainings_one_at_a_time(make: Make, memory: Path) -> None:
    drift: list[str | None] = [None]
    trainer = make("")
    retraining = Retraining(trainer, schedule=hourly(memory), drift=lambda: drift[0])

    def look(minutes: float) -> str | None:
        before = len(trainer.jobs())
        retraining.look(NOON + timedelta(minutes=minutes))
        wait_until(lambda: not trainer.running)
        jobs = trainer.jobs()
        return max(jobs, key=lambda job: (job.started_at, job.id)).why if len(jobs) > before else None

    assert look(0) is None
    assert look(31) == "RETRAIN_SCHEDULE"
    assert look(32) is None
    drift[0] = "texts are longer"
    assert look(33) is not None
    assert look(34) is None
    assert look(35 + DRIFT_PAUSE / timedelta(minutes=1)) is not None  # the schedule first, then drift again


def test_what_is_due_while_a_training_runs_waits_for_its_end(make: Make, memory: Path) -> None:
    trainer = make(SLEEP)
    schedule = hourly(memory)
    schedule.due(NOON)
    trainer.start("POST /retrain")
    Retraining(trainer, schedule=schedule).look(NOON + timedelta(hours=1))
    assert schedule.due(NOON + timedelta(hours=1))
    assert len(trainer.jobs()) == 1
