"""What a problem is: labels, loss, decision, metrics, baselines, calibration. On numpy arrays.

`TASKS` has one task for each problem type; other rooms get theirs with `task_of` and ask it.
"""

from hf_lora.tasks.multi import MultiLabel
from hf_lora.tasks.regression import Regression
from hf_lora.tasks.single import SingleLabel
from hf_lora.tasks.task import MULTI, REGRESSION, SINGLE, TASKS, Task, task_of

for _task in (SingleLabel(), MultiLabel(), Regression()):
    TASKS.register(_task.name, _task)

__all__ = ["MULTI", "REGRESSION", "SINGLE", "TASKS", "Task", "task_of"]
