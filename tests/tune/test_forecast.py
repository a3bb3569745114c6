"""What a search will cost, against sums done here."""

import dataclasses
import shutil
import statistics
from pathlib import Path

import pytest

from rum.cells import RUMConfig
from rum.errors import ConfigError
from rum.experiment import parameter_count
from rum.tasks import CopyingConfig
from rum.training.config import TrainingConfig
from rum.tune.config import Domain, SamplerConfig, SchedulerConfig, SearchConfig, SearchOptions
from rum.tune.forecast import SAMPLES, Forecast, check_disk, forecast
from rum.tune.limits import Limits
from rum.tune.prediction import Cost, Predictor

CONFIG = SearchConfig(
    model=RUMConfig(),
    task=CopyingConfig(delay=3, batch_size=8, steps_per_epoch=5),
    training=TrainingConfig(max_epochs=8, threads=1),
    space={"model.hidden_size": Domain(type="categorical", choices=[16, 32])},
    sampler=SamplerConfig(name="random"),
    scheduler=SchedulerConfig(grace_epochs=1, reduction_factor=2),
    search=SearchOptions(num_trials=10),
)
TASK = CONFIG.task.load(seed=0)


def unlimited() -> Limits:
    return Limits(Predictor(CONFIG, TASK))


def test_parameters_are_those_of_the_space_and_disk_is_two_checkpoints_a_trial(
    tmp_path: Path,
) -> None:
    prediction = forecast(CONFIG, TASK, tmp_path, concurrent=1, limits=unlimited())
    small, large = (parameter_count(RUMConfig(hidden_size=n), TASK) for n in (16, 32))
    assert (prediction.smallest.parameters, prediction.largest.parameters) == (small, large)
    assert prediction.typical.parameters in (small, large)
    per_trial = {  # weights and Adam's two moments, float32, best and last
        int(2 * 12 * statistics.mean([small] * n + [large] * (SAMPLES - n))) * 10
        for n in range(1, SAMPLES)
    }
    assert prediction.disk_bytes in per_trial
    search = dataclasses.replace(CONFIG.search, seeds=5, finalists=2)  # as many again
    repeated = dataclasses.replace(CONFIG, search=search)
    more = forecast(repeated, TASK, tmp_path, concurrent=1, limits=unlimited())
    assert more.disk_bytes == 2 * prediction.disk_bytes
    assert prediction.free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_hours_at_most_are_those_without_early_stopping(tmp_path: Path) -> None:
    prediction = forecast(CONFIG, TASK, tmp_path, concurrent=1, limits=unlimited())
    # All train 1 epoch, half of them a 2nd, a quarter 2 more, an eighth 4 more.
    assert prediction.epochs_per_trial == 1 + 1 / 2 + 2 / 4 + 4 / 8
    assert prediction.hours_at_most / prediction.hours == pytest.approx(8 / 2.5)


def test_without_a_scheduler_every_trial_trains_to_the_end(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, scheduler=SchedulerConfig(name="none"))
    prediction = forecast(config, TASK, tmp_path, concurrent=1, limits=unlimited())
    assert prediction.epochs_per_trial == 8
    assert prediction.hours == prediction.hours_at_most


def test_the_forecast_is_of_the_right_size_and_reads_well(tmp_path: Path) -> None:
    prediction = forecast(
        CONFIG, TASK, tmp_path / "not" / "made", concurrent=2, limits=unlimited()
    )
    # 10 trials of 8 epochs of 5 steps of some ms, two at a time.
    assert 1e-3 < prediction.hours_at_most * 3600 < 60
    assert "Forecast: 0 minutes with early stopping (on average 2.5 epochs a trial)" in str(
        prediction
    )
    parameters = parameter_count(RUMConfig(hidden_size=16), TASK)
    assert str(prediction).startswith(f"Smallest trial: {parameters:,} parameters, about 0.6")
    assert not (tmp_path / "not").exists()


GIGABYTE = 10**9
COST = Cost(1, 1, 1, 1.0)
CLOSE = Forecast(COST, COST, COST, 1.0, 1.0, 1.0, disk_bytes=3 * GIGABYTE, free_bytes=5 * GIGABYTE)


def test_a_disk_that_keeps_the_reserve_passes() -> None:
    check_disk(CLOSE, 2.0)


def test_a_disk_that_does_not_keep_the_reserve_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"needs 3\.0 GB .* 5\.0 GB are free and .* = 2\.5"):
        check_disk(CLOSE, 2.5)
