"""Searches hyperparameters on copying memory.

python pipelines/tune_copying.py preset=quick
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.search import run_search


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="tune_copying")
def main(cfg: DictConfig) -> None:
    """Composes, searches, prints."""
    with reported_errors():
        print(run_search(to_config(cfg)))


if __name__ == "__main__":
    run_pipeline(main, "tune_copying")
