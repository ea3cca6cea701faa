"""Adapters: a few trained matrices beside a frozen, usually quantized, model (`adapter=lora`)."""
