"""The training loop and what it needs: start reading at `step.train_step`."""
