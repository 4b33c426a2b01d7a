"""Fine-tuning of transformers end to end on labels."""

from setfit_kd.finetune.run import FinetuneResult, finetune_run
from setfit_kd.finetune.steps import finetune_steps, resolve_batch_size
from setfit_kd.finetune.train import finetune

__all__ = ["FinetuneResult", "finetune", "finetune_run", "finetune_steps", "resolve_batch_size"]
