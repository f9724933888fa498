"""From a question to the tokens that every path continues."""

from __future__ import annotations

from typing import Any

from sparkray.config.search import SearchConfig
from sparkray.errors import InputError
from sparkray.search.answers import AnswerKind
from sparkray.search.tasks import STOP, Task, find_task

INSTRUCTION = "Think step by step. End with one line: The answer is ..."


BLOCK_TOKENS = 32
"""Tokens of a KV block for short prompts; the default of a CPU engine, 128, is longer than they are."""


def settle(config: SearchConfig) -> SearchConfig:
    """The settings with what their task says: where a path stops, and what an answer looks like.

    Raises:
        NotFoundError: there is no such task.
    """
    if config.task is None:
        return config
    task = find_task(config.task)
    kind: AnswerKind = task.answer_kind if config.answer_kind == "auto" else config.answer_kind
    return config.model_copy(update={"stop": config.stop or STOP, "answer_kind": kind})


def task_prompt_ids(task: Task, question: str, tokenizer: Any) -> list[int]:
    """A task's prompt, with line breaks in front that make it one token longer than whole KV blocks.

    Paths share whole blocks of their prompt, and each computes the rest anew: so that is one token, not up to 32.
    """
    text = tokenizer.encode(task.prompt(question), add_special_tokens=False)
    ids = tokenizer.encode(task.prompt(question))
    special = ids[: len(ids) - len(text)]
    line_break = tokenizer.encode("\n", add_special_tokens=False)[-1]
    return [*special, *[line_break] * ((1 - len(ids)) % BLOCK_TOKENS), *text]


def prompt_ids(config: SearchConfig, question: str, tokenizer: Any) -> list[int]:
    """The prompt: the task's worked examples and the question, or the question as a user's message.

    Args:
        config: the settings; `task` decides.
        question: what is asked; not blank.
        tokenizer: the model's.

    Raises:
        InputError: a blank question.
        NotFoundError: there is no such task.
    """
    if not question.strip():
        raise InputError("the question is empty, and some text is expected.", param="question")
    if config.task is not None:
        return task_prompt_ids(find_task(config.task), question.strip(), tokenizer)
    if getattr(tokenizer, "chat_template", None) is None:
        return list(tokenizer.encode(f"{question.strip()}\n{INSTRUCTION}\n"))
    # As ids and not as text, since a template writes its own first token and a tokenizer would add another.
    messages = [{"role": "user", "content": f"{question.strip()}\n{INSTRUCTION}"}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
