"""Learning from examples.

Reading order: optim, schedule, loss, step, checkpoint, supervised (pretraining and fine-tuning).
"""
