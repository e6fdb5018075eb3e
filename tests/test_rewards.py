"""The rewards: tables of completions, right, malformed and hostile. Answers, calls and code have their own files."""

import itertools
import math
import time

import pytest
from test_code_reward import message

from fastgrpo import rewards
from fastgrpo.recipes import word_problems
from fastgrpo.rewards import fences, text
from fastgrpo.rewards.rules import _SCRIPTS
from fastgrpo.trainer.rollout import tokenize_prompts

MEGABYTE = 1 << 20
R1 = "<think>{}</think><answer>{}</answer>"


def one(function, completion, **columns):
    (score,) = function(completions=[completion], **{name: [value] for name, value in columns.items()})
    return score


# format and tags

FORMATS = [
    (R1.format("why", "42"), 1, 1),
    (" \n<think>\nwhy\n</think>\n\n<answer>\n42\n</answer>\n", 1, 1),
    (R1.format("", ""), 1, 1),
    (R1.format("中文 ½", "é"), 1, 1),
    (message(R1.format("why", "42")), 1, 1),
    ("So: " + R1.format("why", "42"), 0, 1),
    (R1.format("why", "42") + " done", 0, 1),
    ("<think>why</think> so <answer>42</answer>", 0, 1),
    ("<answer>42</answer><think>why</think>", 0, 1),
    ("</think>why<think></answer>42<answer>", 0, 1),
    ("<think>why<answer>42</answer></think>", 0, 1),
    ("<think>why<answer></think>42</answer>", 0, 1),
    (R1.format("<think>why</think>", "42"), 0, 0.5),
    (R1.format("why", "42") * 2, 0, 0),
    ("<think>why</think><answer>42", 0, 0.75),
    ("why</think><answer>42</answer>", 0, 0.75),
    ("<think>why", 0, 0.25),
    ("<THINK>why</THINK><answer>42</answer>", 0, 0.5),
    ("< think >why</think><answer>42</answer>", 0, 0.75),
    ("<think", 0, 0),
    ("", 0, 0),
    ("   ", 0, 0),
    (message(None), 0, 0),
    ([], 0, 0),
    (None, 0, 0),
]


@pytest.mark.parametrize("completion, is_format, tags", FORMATS)
def test_format_and_tags(completion, is_format, tags):
    assert one(rewards.format_reward, completion) == is_format
    assert one(rewards.tag_count_reward, completion) == tags


REST = "why</think><answer>42</answer>"
ENDS = [
    ("Assistant: <think>", 1),
    ("Assistant: <think>\n", 1),
    ("Assistant:", 0),
    ("Use <think> </think>", 0),
    ("Assistant: <think>\n\n</think>", 0),
    ("Assistant: <answer>", 0),
    ("", 0),
    (None, 0),
    ([{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>\n"}], 1),
    ([{"role": "user", "content": "<think>"}], 0),  # the user's word is no prefill
    ([], 0),
]


@pytest.mark.parametrize("prompt, prefilled", ENDS)
def test_format_behind_a_prefilled_think(prompt, prefilled):
    for completion in (REST, message(REST)):
        assert one(rewards.format_reward, completion, prompts=prompt) == prefilled
        assert one(rewards.tag_count_reward, completion, prompts=prompt) == 0.75 + 0.25 * prefilled
        assert one(rewards.prefilled("<think>", rewards.format_reward), completion, prompts=None) == 1
    assert one(rewards.format_reward, R1.format("why", "42"), prompts=prompt) == 1 - prefilled
    assert one(rewards.format_reward, "why<answer>42</answer>", prompts=prompt) == 0


def test_format_behind_a_think_of_the_chat_template():
    """The evaluation and the trainer read the end of the text that the template made."""
    tokenizer = word_problems.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    )
    messages = [{"role": "user", "content": "Greet Ann."}]
    prompts = text.rendered(tokenizer, [messages], tokenize_prompts(tokenizer, [messages]))
    assert prompts == [messages] and isinstance(prompts[0], list)
    completions = [message(REST)]
    assert rewards.format_reward(completions=completions, prompts=prompts) == [1]
    assert rewards.format_reward(completions=completions, prompts=[messages]) == [0]
    by_hand = rewards.prefilled("<think>", rewards.format_reward)
    assert by_hand.__name__ == "format_reward"
    assert by_hand(completions=completions, prompts=prompts) == [1]
    chosen = rewards.by_column("kind", {"a": rewards.combine(rewards.format_reward)})
    assert chosen(completions=completions, prompts=prompts, kind=["a"]) == [1]
    assert text.rendered(tokenizer, ["plain"], [[1]]) == ["plain"]


def test_text_of_messages():
    parts = [{"type": "image"}, {"type": "text", "text": "b"}, {"type": "text", "text": None}]
    conversation = [
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "42"},  # not what the model wrote
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
    ]
    assert rewards.completion_text(conversation) == "ab"


# language

LANGUAGES = [
    ("en", "<think>all of this is English</think><answer>中文</answer>", 1.0),
    ("en", "so we 得到 two", 0.6),
    ("zh", "<think>设 x 为 3.5,\\frac{1}{2} 则有</think>", 1.0),
    ("zh", "所以 the answer", 0.5),
    ("ja", "これは漢字です", 1.0),
    ("zh", "これは漢字です", 2 / 7),
    ("ko", "정답은 셋 that", 2 / 3),
    ("ru", "и так далее", 1.0),
    ("ar", "الجواب هو two", 2 / 3),
    ("en", "naïve cafe\u0301 Straße", 1.0),
    ("en", "ελληνικά words", 0.5),
    ("en", "ends with words</think>答案", 1.0),
    ("en", "<think>never ends", 1.0),
    ("en", "<answer>", None),
    ("en", "1 + 2 = x, α", None),
    ("en", "<think></think><answer>words</answer>", None),
    ("en", "", None),
    ("en", None, None),
]


@pytest.mark.parametrize("target, completion, share", LANGUAGES)
def test_language(target, completion, share):
    assert one(rewards.language_consistency_reward(target), completion) == (share and pytest.approx(share))


def test_every_script_knows_its_language():
    samples = dict(ar="نعم", en="yes", ja="はい", ko="네", ru="да", zh="是")
    assert samples.keys() == _SCRIPTS.keys()
    for (target, _), (language, sample) in itertools.product(samples.items(), samples.items()):
        known = one(rewards.language_consistency_reward(target), sample)
        assert known == (target == language or (target, language) == ("ja", "zh")), (target, language)


def test_language_by_py3langid():
    pytest.importorskip("py3langid")
    reward = rewards.language_consistency_reward("fr")
    french, english = "Nous cherchons la solution de cette question.", "We look for the solution of this question."
    assert one(reward, f"{french}\n{english}\n\n") == pytest.approx(7 / 15)
    with pytest.raises(ValueError, match="target: expected one of .*got 'klingon'"):
        rewards.language_consistency_reward("klingon")


def test_unknown_language(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="target: expected one of ar, en, ja, ko, ru, zh .*py3langid.*got 'fr'"):
        rewards.language_consistency_reward("fr")


# repetition and length


@pytest.mark.parametrize(
    "completion, size, score",
    [
        ("a b c d", 3, 0.0),
        ("a b c a b c", 3, -0.25),  # abc bca cab abc
        ("A b a B", 2, -1 / 3),
        ("yes " * 102, 3, -0.99),
        ("好" * 12, 3, -0.9),
        ("好的好的好的", 2, -0.6),
        ("ok 好的", 3, 0.0),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
        (message(None), 3, 0.0),
    ],
)
def test_repetition(completion, size, score):
    assert one(rewards.repetition_penalty_reward(size), completion) == pytest.approx(score)
    assert one(rewards.repetition_penalty_reward(size, -0.5), completion) == pytest.approx(score / 2)


def test_soft_overlong():
    lengths = [0, 1, 80, 81, 90, 99, 100, 101, 1000]
    ids = [[7] * length for length in lengths]
    want = [0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1]
    assert rewards.soft_overlong_reward(100, 20)(completions=lengths, completion_ids=ids) == pytest.approx(want)
    assert rewards.soft_overlong_reward(100, 0)(completion_ids=ids) == [0.0] * 7 + [-1.0] * 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: rewards.repetition_penalty_reward(0), "ngram_size: .*>= 1.*got 0"),
        (lambda: rewards.repetition_penalty_reward(2.0), "ngram_size: .*integer.*got 2.0"),
        (lambda: rewards.repetition_penalty_reward(3, 1.0), "max_penalty: .*<= 0, got 1.0"),
        (lambda: rewards.repetition_penalty_reward(3, math.nan), "max_penalty: .*nan"),
        (lambda: rewards.soft_overlong_reward(0, 0), "max_completion_length: .*>= 1.*got 0"),
        (lambda: rewards.soft_overlong_reward(100, 101), r"soft_cache: .*\[0, 100\].*got 101"),
        (lambda: rewards.combine(), "reward_funcs: .*at least one"),
        (lambda: rewards.combine(rewards.exact, weights=[1, 2]), "weights: expected 1 .*got"),
        (lambda: rewards.combine(rewards.exact, weights=[math.inf]), "weights: .*finite"),
        (lambda: rewards.Limits(seconds=0), "seconds: .*> 0, got 0"),
        (lambda: rewards.Limits(memory=1e9), "memory: .*integer.*got 1000000000.0"),
        (
            lambda: rewards.code_reward([""], [["assert 1", 3]]),
            r"test_cases: row 0: .*got list of 2 \(str 'assert 1', int\)",
        ),
        (
            lambda: rewards.code_reward([""], [[{"input": "1"}]]),
            r"test_cases: row 0: .*got list of 1 \(dict \(input: str '1'\)\)",
        ),
        (lambda: rewards.resolve("nothing"), "reward: expected one of exact, .*code.*got 'nothing'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# hostile text

BAIT = {
    "answers": "<answer>" * (MEGABYTE // 8),
    "closed-answers": "</answer>" * (MEGABYTE // 9),
    "pairs": "<answer></answer>" * (MEGABYTE // 17),
    "thinks": "<think>" * (MEGABYTE // 7) + "</think>",
    "boxes": "\\boxed{" * (MEGABYTE // 7),
    "box-gaps": ("\\boxed" + " " * 50) * (MEGABYTE // 56),
    "box-spaces": "\\boxed" + " " * MEGABYTE,
    "braces": "\\boxed{" + "{}" * (MEGABYTE // 2),
    "open-braces": "\\boxed{" + "{" * MEGABYTE,
    "backslashes": "\\boxed{" + "\\" * MEGABYTE,
    "digits": "<answer>" + "1" * MEGABYTE + "</answer>",
    "commas": "<answer>" + "1," * (MEGABYTE // 2) + "</answer>",
    "dots": "-." * (MEGABYTE // 2),
    "dollars": "<answer>" + "$" * MEGABYTE + "</answer>",
    "spaces": " " * MEGABYTE,
    "newlines": "\n" * MEGABYTE,
    "letters": "a" * MEGABYTE,
    "words": "a b " * (MEGABYTE // 4),
    "han": "好" * MEGABYTE,
    "accents": "e" + "\u0301\u0323" * (MEGABYTE // 2),
    "fences": "```python\n" * (MEGABYTE // 10),
    "tildes": "~~~\n" * (MEGABYTE // 4),
    "quotes": ("> " * 40 + "```\n") * (MEGABYTE // 84),
    "lists": "- " * (MEGABYTE // 2) + "```\n",
    "nested-lists": "- " * 40 + "```\n" + "\n" * MEGABYTE,
    "tabs": "```\n" + ("\t" * 60 + "x\n") * (MEGABYTE // 62),
    "returns": "```\n" + "\r" * MEGABYTE,
    "unbraced-boxes": "\\boxed 1 " * (MEGABYTE // 9),
    "named-boxes": "\\boxed it then " * (MEGABYTE // 15),
    "options-of-boxes": "\\boxed[" * (MEGABYTE // 7),
    "nested-boxes": "\\boxed{" * (MEGABYTE // 14) + "1" + "}" * (MEGABYTE // 14),
    "fractions": "\\frac{1}" * (MEGABYTE // 8),
    "slashes": "1/1/" * (MEGABYTE // 4),
    "twos": "12,34," * (MEGABYTE // 6),
    "threes": "123," * (MEGABYTE // 4),
    "powers": "1\\times10^" * (MEGABYTE // 10),
    "mixed": "1 1/" * (MEGABYTE // 4),
    "halves": "½" * MEGABYTE,
    "minuses": "-" * MEGABYTE,
    "currencies": "-$" * (MEGABYTE // 2),
    "units": "<answer>1" + " a" * 400 + "</answer>",
    "ticks": "`" * MEGABYTE,
    "surrogates": "\ud800" * MEGABYTE,
    "zeros": "\0" * MEGABYTE,
    "distinct": " ".join(map(str, range(MEGABYTE // 7))),
}
TEXT_REWARDS = {
    "exact": rewards.exact,
    "contains": rewards.contains,
    "numeric": rewards.numeric,
    "accuracy": rewards.accuracy_reward,
    "format": rewards.format_reward,
    "tag_count": rewards.tag_count_reward,
    "language": rewards.language_consistency_reward("zh"),
    "repetition": rewards.repetition_penalty_reward(),
}


@pytest.mark.parametrize("bait", BAIT)
def test_megabytes_take_linear_time(bait):
    for name, reward in TEXT_REWARDS.items():
        start = time.process_time()
        score = one(reward, BAIT[bait], answer="1")
        seconds = time.process_time() - start
        assert score is None or -1 <= score <= 1
        assert seconds < 1.5, f"{name}: {seconds:.2f} s"  # linear: 0.4 s at most on a slow core; quadratic: minutes
    start = time.process_time()
    fences.last_python_block(BAIT[bait])
    assert time.process_time() - start < 1.5
