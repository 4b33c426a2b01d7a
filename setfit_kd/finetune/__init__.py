"""Fine-tuning of transformers end to end on labels."""
