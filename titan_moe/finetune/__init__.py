"""Fine-tuning of Transformers MoE models with the loss terms attached, by the trainers of TRL and PEFT."""
