"""Give a quantized DeepSeek-V4 checkpoint its multi-token-prediction head back."""

#: The vLLM that the plugin and the server's command line are written for, and newer ones.
SUPPORTED_VLLM = ">=0.32"
#: The newest that was tried, by platform: doctor warns of a newer one.
TRIED_VLLM = {"cpu": "0.32.0", "cuda": "0.33.0"}
