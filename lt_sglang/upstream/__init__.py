"""What lt_sglang relies on in SGLang and FlashInfer, and the checks that it still holds."""
