"""Checks that Optuna and MLflow say the same of every trial of a study.

python pipelines/check.py study=character_lm-ptb-rum
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.audit import check_study


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="check")
def main(cfg: DictConfig) -> None:
    """Composes, compares, prints."""
    with reported_errors():
        text, agrees = check_study(to_config(cfg))
    print(text)
    raise SystemExit(0 if agrees else 1)


if __name__ == "__main__":
    run_pipeline(main, "check")
