"""Training: encoding and packing of examples, the trainer, LoRA adapters, sharding and checkpoints."""
