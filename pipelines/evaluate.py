"""Evaluates a checkpoint or a registered model on validation and test.

python pipelines/evaluate.py checkpoint=models:/rum-character_lm-ptb@best
"""

import hydra
from omegaconf import DictConfig

from rum.configs import reported_errors, run_pipeline, to_config
from rum.tune.evaluation import evaluate_checkpoint


@hydra.main(version_base="1.3", config_path="../search_spaces", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Composes, evaluates, prints."""
    with reported_errors():
        print(evaluate_checkpoint(to_config(cfg)))


if __name__ == "__main__":
    run_pipeline(main, "evaluate")
