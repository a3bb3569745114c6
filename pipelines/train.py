"""Trains one model; needs torch and hydra only.

python pipelines/train.py task=copying model=rum task.delay=30 model.hidden_size=100
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.recorder import train_or_repeat


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="train")
def main(cfg: DictConfig) -> None:
    """Composes, trains, prints."""
    with reported_errors():
        train_or_repeat(to_config(cfg), print)


if __name__ == "__main__":
    run_pipeline(main, "train")
