"""`qwen3cp bench`: prefill and decode measured in several ways, which take turns."""
