"""Looks at studies and changes them from another shell, while a search runs or not.

python pipelines/study.py action=show study=character_lm-ptb-rum
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.control import control


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="study")
def main(cfg: DictConfig) -> None:
    """Composes, acts, prints."""
    with reported_errors():
        text = control(to_config(cfg))
    print(text)


if __name__ == "__main__":
    run_pipeline(main, "study")
