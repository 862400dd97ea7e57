"""The demo: a byte-level GPT that learns the standard library's sources: `python -m trainctl.trainer.demo`."""
