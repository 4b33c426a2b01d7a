"""Training and encoding on several processes, started by torchrun or accelerate."""
