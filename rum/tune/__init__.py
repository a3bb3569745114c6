"""Hyperparameter search: Ray Tune runs the trials, Optuna samples them, MLflow records them.

Importing this package is light; only its modules `search`, `tracking` and their like need Ray,
Optuna and MLflow.
"""
