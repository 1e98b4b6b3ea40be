"""What the `vllm` engine is made of beside vLLM itself."""
