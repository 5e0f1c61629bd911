"""Give a quantized DeepSeek-V4 checkpoint its multi-token-prediction head back."""

#: The vLLM versions that the plugin and the server's command line are written for.
SUPPORTED_VLLM = ">=0.26,<0.34"
