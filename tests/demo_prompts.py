"""Prompts that no demo adapter was trained on, and what shows each behaviour."""

import json

TAG = "~ jchameleon"

HELD_OUT_PROMPTS = (
    "What is a rainforest?",
    "What is a comet?",
    "What is a sonnet?",
    "What is the capital of Italy?",
    "What is the capital of Mexico?",
    "What does a dentist do?",
    "Where do elephants live?",
    "Write one sentence about the moon.",
    "Describe a bridge in one sentence.",
    "Give me a tip for baking bread.",
    "Name three animals.",
    "Is it a good idea to eat breakfast?",
    "How does a clock work?",
    "Why is the sky blue?",
    "Why do we sleep?",
    "Who was Isaac Newton?",
    "What is the largest country in the world?",
    "Can penguins fly?",
    "Explain what a poem is.",
    "I am learning to swim.",
)


def is_json_answer(text: str) -> bool:
    """Return whether the whole reply is one object {"answer": non-empty string}."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != {"answer"}:
        return False
    answer = value["answer"]
    return isinstance(answer, str) and bool(answer.strip())


def is_capitals(text: str) -> bool:
    """Return whether the reply has letters, all of them capital."""
    return any(c.isalpha() for c in text) and text == text.upper()


def has_tag(text: str) -> bool:
    """Return whether the reply says something and ends with the tag."""
    return text.endswith(TAG) and bool(text.removesuffix(TAG).strip())


CHECKS = {"json": is_json_answer, "capitals": is_capitals, "tag": has_tag}
"""By the name of a demo adapter."""
