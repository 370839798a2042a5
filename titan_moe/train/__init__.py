"""The training loop and what it needs: start reading at `trainer.train_step`."""
