"""The loop and what surrounds a step: checkpoints, metrics, evaluation, reports. Knows torch, not Ray."""
