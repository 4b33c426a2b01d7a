"""Fine-tuning a transformer end to end on labels."""

from setfit_kd.finetune.run import FinetuneResult, finetune_run
from setfit_kd.finetune.steps import batch_size_on, finetune_steps
from setfit_kd.finetune.train import finetune

__all__ = [
    "FinetuneResult",
    "batch_size_on",
    "finetune",
    "finetune_run",
    "finetune_steps",
]
