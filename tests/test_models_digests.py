"""Checksums of a model change with each of its parts, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

from jchameleon.models.chat import ChatTemplate
from jchameleon.models.digests import model_digests
from jchameleon.models.loader import load_model
from jchameleon.models.tokenizer import Tokenizer, byte_tokenizer

TEMPLATE = "{{ messages[0].content }}"


def leaves(change=None):
    tree = [np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float32)]
    if change is not None:
        change(tree)
    return [jnp.asarray(leaf) for leaf in tree]


def digests(change=None, *, tokenizer=None, template=None):
    return model_digests(
        leaves(change),
        tokenizer or byte_tokenizer(),
        template or ChatTemplate(TEMPLATE),
    )


def differing(**changes):
    before, after = digests(), digests(**changes)
    return {part for part in before if before[part] != after[part]}


def flip_a_bit(tree):
    tree[1].view(np.uint32)[3] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        lambda tree: tree.reverse(),
        lambda tree: tree.append(np.zeros(0, np.float32)),
        lambda tree: tree.__setitem__(0, tree[0].reshape(3, 2)),
        lambda tree: tree.__setitem__(1, tree[1].view(np.int32)),
    ],
)
def test_weights_count_to_the_last_bit_and_with_order_shape_and_dtype(change):
    assert differing(change=change) == {"weights"}


def test_same_content_has_the_same_digests():
    assert differing() == set()
    one, two = (load_model("tiny", dtype="bfloat16") for _ in range(2))
    assert len({_of(one)["weights"], _of(two)["weights"]}) == 1
    assert _of(one)["chat_template"] is None
    assert _of(load_model("tiny", dtype="float32")) != _of(one)


def _of(model):
    params = jax.tree.leaves(model.params)
    return model_digests(params, model.tokenizer, model.chat_template)


def test_template_counts_with_its_special_tokens():
    assert differing(template=ChatTemplate(TEMPLATE + " ")) == {"chat_template"}
    marked = ChatTemplate(TEMPLATE, special_tokens={"bos_token": "<s>"})
    assert differing(template=marked) == {"chat_template"}


def test_tokenizer_counts_with_what_it_puts_around_a_text():
    made = byte_tokenizer()
    backend = Backend.from_str(made._backend.to_str())
    same = {"bos_token_id": 256, "eos_token_ids": (257,)}
    unlike = [
        Tokenizer(backend, **same),
        Tokenizer(backend, **same, prefix_ids=(256,), suffix_ids=(257,)),
        Tokenizer(backend, bos_token_id=256, prefix_ids=(256,)),
    ]
    for tokenizer in unlike:
        assert differing(tokenizer=tokenizer) == {"tokenizer"}
    assert differing(tokenizer=Tokenizer(backend, **same, prefix_ids=(256,))) == set()
    backend.add_tokens(["new"])
    grown = Tokenizer(backend, **same, prefix_ids=(256,))
    assert differing(tokenizer=grown) == {"tokenizer"}
