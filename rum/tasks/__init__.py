"""Tasks of the paper and their registry."""

from rum.tasks.babi import BabiConfig, BabiTask
from rum.tasks.base import TASKS, Batch, Task, TaskConfig, Totals, register_task
from rum.tasks.character_lm import CharacterLMConfig, CharacterLMTask
from rum.tasks.copying import CopyingConfig, CopyingTask
from rum.tasks.recall import RecallConfig, RecallTask

__all__ = [
    "TASKS",
    "BabiConfig",
    "BabiTask",
    "Batch",
    "CharacterLMConfig",
    "CharacterLMTask",
    "CopyingConfig",
    "CopyingTask",
    "RecallConfig",
    "RecallTask",
    "Task",
    "TaskConfig",
    "Totals",
    "register_task",
]
