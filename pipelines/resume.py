"""Continues the best trials of a study.

python pipelines/resume.py study=character_lm-ptb-rum top=3 training.max_epochs=200
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.continuation import continue_best


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="resume")
def main(cfg: DictConfig) -> None:
    """Composes, continues, prints."""
    with reported_errors():
        print(continue_best(to_config(cfg)))


if __name__ == "__main__":
    run_pipeline(main, "resume")
