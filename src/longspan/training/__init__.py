"""Training by recipe: `train` carries one out, `plan_training` says before what it will take."""

from longspan.training import estimate, run
from longspan.training.estimate import TrainPlan, plan_training
from longspan.training.run import TrainResult, train

__all__ = ["TrainPlan", "TrainResult", "estimate", "plan_training", "run", "train"]
