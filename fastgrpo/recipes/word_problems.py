"""The task behind `fastgrpo train --recipe` without a model: word problems and requests in English and Chinese.

    Tom has 3+7+4?    <think>now 10, now 14</think><answer>14</answer>
    明有3+7+4?        <think>得10,得14</think><answer>14</answer>
    Thank Tom.        Thanks Tom!

Nothing is downloaded. The base model learns from documents like those that a pretraining corpus would hold: solutions
with the tags, without them and with some of them, with wrong results, with words of the other language in the steps;
and replies of which few are good ones. So it samples all of these, and there is something to select from.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from fastgrpo._defaults import WORD_PROBLEMS
from fastgrpo.recipes import tiny
from fastgrpo.rewards.text import TAGS, completion_text

MAX_COMPLETION_LENGTH, HELD_OUT = WORD_PROBLEMS.max_completion_length, WORD_PROBLEMS.held_out
MOST_HELD_OUT = 400  # of 686 questions: 343 triples of numbers in two languages
SAMPLES = 8  # of each held-out prompt, to measure a stage

NAMES = {
    "en": ("Tom", "Ann", "Bob", "Eve", "Max", "Sue", "Kim", "Leo", "Ida", "Ned"),
    "zh": ("明", "红", "华", "丽", "军", "芳", "强", "梅", "雷", "云"),
}
QUESTIONS = {"en": "{} has {}+{}+{}?", "zh": "{}有{}+{}+{}?"}
STEP = {"en": "now ", "zh": "得"}  # and the number that there is after a step
COMMA = {"en": ", ", "zh": ","}
# what is asked for, and the reply; braces stand for the name
REQUESTS = {
    "en": {"Greet {}.": "Hello {}!", "Thank {}.": "Thanks {}!", "Cheer {}.": "Bravo {}!", "Leave {}.": "Bye {}!"},
    "zh": {"问候{}。": "你好{}!", "感谢{}。": "谢谢{}!", "祝贺{}。": "恭喜{}!", "告别{}。": "再见{}!"},
}
LANGUAGES = tuple(NAMES)


def _texts() -> list[str]:
    """Every text that a document is made of."""
    tables = [QUESTIONS, STEP, COMMA]
    texts = [text for table in tables for text in table.values()]
    for language in LANGUAGES:
        texts += [*NAMES[language], *REQUESTS[language], *REQUESTS[language].values()]
    return [*texts, "0123456789+"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one for each of the four tags."""
    characters = sorted(set("".join(_texts())) - set("{}"))
    return tiny.make_tokenizer([*TAGS, *characters], r"</?(think|answer)>|<eos>|.")


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Two layers, 64 wide, about 140 thousand parameters, random."""
    return tiny.make_model(Qwen2ForCausalLM, tokenizer, seed)


def make_questions(seed: int, held_out: int = HELD_OUT) -> tuple[Dataset, Dataset]:
    """(training questions, held-out questions) with the columns `prompt`, `answer`, `language` and `steps`.

    No numbers of a held-out question occur together, in this order, in a training question of either language.
    `steps` are the two results on the way, of which the second is the answer.
    """
    rng = random.Random(seed)
    numbers = list(itertools.product(range(1, 8), repeat=3))
    rng.shuffle(numbers)
    rows = [_question(rng, language, *abc) for abc in numbers for language in LANGUAGES]
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def _question(rng: random.Random, language: str, a: int, b: int, c: int) -> dict:
    prompt = QUESTIONS[language].format(rng.choice(NAMES[language]), a, b, c)
    return {"prompt": prompt, "answer": str(a + b + c), "language": language, "steps": [a + b, a + b + c]}


def make_requests(seed: int, held_out: int = 16, languages: Sequence[str] = LANGUAGES) -> tuple[Dataset, Dataset]:
    """(training requests, held-out requests), each a name with something to say to it, with the column `prompt`."""
    rng = random.Random(seed)
    prompts = [r.format(name) for language in languages for r in REQUESTS[language] for name in NAMES[language]]
    rng.shuffle(prompts)
    rows = [{"prompt": prompt} for prompt in prompts]
    return Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])


def courtesy_reward(prompts: list, completions: list, **_) -> list[float]:
    """The judge of replies to requests, which a reward model stands for with real models: a third each for the right
    words in the language of the request, for the name, and for an exclamation mark at the end.
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion_text(completion)
        language, request, name = _REQUEST_OF[prompt if isinstance(prompt, str) else prompt[-1]["content"]]
        words = REQUESTS[language][request].partition("{}")[0].strip()
        marks = [text.startswith(words), name in text, text.endswith(REQUESTS[language][request][-1])]
        scores.append(sum(marks) / 3)
    return scores


_REQUEST_OF = {
    request.format(name): (language, request, name)
    for language in LANGUAGES
    for request in REQUESTS[language]
    for name in NAMES[language]
}


def documents(questions: Dataset, requests: Dataset, count: int, seed: int) -> Dataset:
    """`count` pretraining documents with the columns `prompt` and `completion`, every sixth a request's."""
    rng = random.Random(seed)
    problems, prompts = questions.to_list(), requests["prompt"]
    return Dataset.from_list(
        [reply(rng, rng.choice(prompts)) if i % 6 == 0 else _document(rng, rng.choice(problems)) for i in range(count)]
    )


def _document(rng: random.Random, row: dict) -> dict:
    steps = list(row["steps"])
    if rng.random() < 0.25:  # a slip in the last step
        steps[1] += rng.choice((-2, -1, 1, 2))
    text, kind = _solution(rng, row["language"], steps, mixed=0.3), rng.random()
    if kind < 0.35:  # steps alone, without tags
        text = text[len(TAGS[0]) : text.index(TAGS[1])]
    elif kind < 0.55:  # the end of the answer is missing, or that of the reasoning
        text = text.replace(rng.choice((TAGS[1], TAGS[3])), "")
    return {"prompt": row["prompt"], "completion": text}


def _solution(rng: random.Random, language: str, steps: list[int], mixed: float) -> str:
    """Steps and answer in the tags; a step is in the other language with probability `mixed`."""
    other = {"en": "zh", "zh": "en"}[language]
    written = [STEP[other if rng.random() < mixed else language] + str(step) for step in steps]
    return f"{TAGS[0]}{COMMA[language].join(written)}{TAGS[1]}{TAGS[2]}{steps[-1]}{TAGS[3]}"


def reply(rng: random.Random, prompt: str) -> dict:
    """A request with a reply of any quality, as a document or as a sample of general data: `prompt`, `completion`."""
    language, request, name = _REQUEST_OF[prompt]
    if rng.random() < 0.3:
        request = rng.choice(list(REQUESTS[language]))
    if rng.random() < 0.3:
        name = rng.choice(NAMES[language])
    text = REQUESTS[language][request].format(name)
    return {"prompt": prompt, "completion": text if rng.random() < 0.5 else text[:-1]}


def cold_start_examples(questions: Dataset, count: int, seed: int) -> Dataset:
    """`count` training questions with long-form solutions, both steps written out, in the question's language but for
    one step in ten: the columns `prompt` and `completion`.
    """
    rng = random.Random(seed)
    rows = rng.sample(questions.to_list(), count)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": _solution(rng, row["language"], row["steps"], mixed=0.1)}
            for row in rows
        ]
    )


def general_samples(requests: Dataset, count: int, seed: int) -> Dataset:
    """`count` requests with replies of any quality: the columns `prompt` and `completion`."""
    rng = random.Random(seed)
    return Dataset.from_list([reply(rng, rng.choice(requests["prompt"])) for _ in range(count)])
