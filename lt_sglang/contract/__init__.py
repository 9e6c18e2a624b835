"""What lt_sglang relies on in SGLang, recorded, and the checks that it still holds."""
