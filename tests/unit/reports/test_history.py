import math

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_prune.errors import PruneError
from lightning_prune.reports import Series, read_history


def test_the_file_that_lightning_writes(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=1)
    logger.log_metrics({"val_loss": 0.25, "epoch": 0}, step=2)
    logger.log_metrics({"loss": 0.125}, step=3)
    logger.save()
    for source in (logger.log_dir, f"{logger.log_dir}/metrics.csv"):
        found = read_history(source)
        assert found["loss"] == Series(steps=(1, 3), values=(0.5, 0.125))
        assert found["val_loss"] == Series(steps=(2,), values=(0.25,))
        assert set(found) == {"loss", "val_loss"}


def test_rows_may_come_in_any_order_and_the_last_of_a_step_counts():
    rows = [{"step": 5, "x": 1.0}, {"step": 2, "x": 2}, {"step": 5, "x": 3.0, "y": None}]
    assert read_history(rows) == {"x": Series(steps=(2, 5), values=(2.0, 3.0))}


def test_a_row_without_a_step_is_refused():
    with pytest.raises(PruneError, match="row 2"):
        read_history([{"step": 1, "x": 1}, {"x": 1}])


def test_what_is_no_number_is_refused():
    with pytest.raises(PruneError, match="row 1, 'x'"):
        read_history([{"step": 1, "x": "high"}])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PruneError, match=r"metrics\.csv"):
        read_history(tmp_path)


def test_smoothing_passes_over_what_is_not_finite():
    series = Series(steps=(1, 2, 3, 4), values=(1.0, math.nan, 3.0, 5.0))
    assert series.smoothed(1).values[::2] == (1.0, 3.0)
    assert series.smoothed(3).values == (1.0, 2.0, 4.0, 4.0)
    assert math.isnan(Series(steps=(1,), values=(math.inf,)).smoothed(3).last)
