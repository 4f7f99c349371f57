"""A small SentencePiece vocabulary, as GGUF metadata holds it."""

SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
SPM_WORDS = ["▁", "a", "b", "c", "ab", "▁a", "bc", "abc", "▁ab", "cab", "▁▁", "aa", "é"]
SPM_TYPES = [2, 3, 3, *[6] * 256, *[1] * len(SPM_WORDS)]
# Not in the order of the words' ids, so that scores matter.
SPM_SCORES = [0.0] * 259 + [-9.0, -8, -7, -6, -3, -4, -1, -2, -5, -2.5, -3.5, -6.5, -10]


def spm_metadata(**extra):
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM_TOKENS + SPM_WORDS,
        "tokenizer.ggml.token_type": SPM_TYPES,
        "tokenizer.ggml.scores": [float(score) for score in SPM_SCORES],
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }
