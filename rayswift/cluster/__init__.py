"""Ray lives here: the session that is joined or started, the trainer, and the worker function."""
