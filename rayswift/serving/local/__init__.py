"""The parts of the `local` engine: batch of caches, sampling, text, and the thread that decodes."""
