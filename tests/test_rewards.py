"""The rewards: tables of completions, right, malformed and hostile; TRL's calls. Code is in test_code_reward.py."""

import array
import collections
import functools
import itertools
import math
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_code_reward import DOUBLE, DOUBLES, block, linux, message

from fastgrpo.trainer import GRPOConfig, GRPOTrainer, embedded, evaluate, rewards, word_problems
from fastgrpo.trainer.rewards import accuracy, fences, quantities, sandbox, text
from fastgrpo.trainer.rewards.rules import _SCRIPTS
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


# accuracy

ANSWERS = [
    ("<answer>42</answer>", "42", 1),
    ("<answer>\n 42 \n</answer>", 42, 1),
    (R1.format("41", "42"), "42", 1),
    (R1.format("<answer>42</answer>", "41"), "42", 0),
    ("hm 41</think><answer>42</answer>", "42", 1),
    (message(R1.format("", "42")), "42", 1),
    ("<answer>41</answer> no, <answer>42</answer>", "42", 1),
    ("<answer>42</answer> no, <answer>41</answer>", "42", 0),
    ("<answer>42</answer> and <answer>41", "42", 1),
    ("<answer>41<answer>42</answer>", "42", 1),
    ("<answer>42</answer></answer>", "42", 1),
    ("<answer>42", "42", 0),
    ("42</answer>", "42", 0),
    ("</answer>42<answer>", "42", 0),
    ("42", "42", 0),
    ("", "42", 0),
    ("<answer></answer>", "42", 0),
    ("<answer></answer>", "", 0),
    ("<answer>42</answer>", None, None),
    ("<think><answer>42</answer>", "42", 0),
    ("<think>so \\boxed{42}", "42", 0),
    ("<think>so \\boxed{42}</think>", "42", 0),
    (message(None), "42", 0),
    # text
    ("<answer>New\n York</answer>", "New York", 1),
    ("<answer>new york</answer>", "New York", 1),
    ("<answer>北京</answer>", "北京", 1),
    ("<answer>listen</answer>", "silent", 0),
    ("<answer>no</answer>", "on", 0),
    # numbers
    ("<answer>1,234.0</answer>", "1234", 1),
    ("<answer>1234</answer>", "1,2,3,4", 0),
    ("<answer>12,34</answer>", "1234", 0),
    ("<answer>3/4</answer>", "0.75", 1),
    ("<answer>¾</answer>", "0.75", 1),
    ("<answer>2½</answer>", "2.5", 1),
    ("<answer>-2 1/2</answer>", "-2.5", 1),
    ("<answer>−5</answer>", "-5.00", 1),
    ("<answer>75%</answer>", ".75", 1),
    ("<answer>75%</answer>", "75", 1),
    ("<answer>75%</answer>", "0.75%", 0),
    (r"<answer>75\%</answer>", "3/4", 1),
    ("<answer>$1,000</answer>", "1e3", 1),
    ("<answer>+7.</answer>", "7", 1),
    (r"<answer>$-\dfrac{3}{4}$</answer>", "-.75", 1),
    (r"<answer>1{,}234</answer>", "1234", 1),
    ("<answer>0.333</answer>", "1/3", 0),
    ("<answer>1/0</answer>", "1/0", 1),
    ("<answer>1/0</answer>", "2/0", 0),
    ("<answer>1e999</answer>", "1e998", 0),
    ("<answer>1e99999999999</answer>", "1", 0),
    ("<answer>0.1</answer>", "0.10000000000000001", 0),
    ("<answer>42</answer>", "Six times seven is 42.\n#### 42", 1),
    # boxes
    (r"so \boxed{42}", "42", 1),
    (r"\boxed{41} or \boxed {42}", "42", 1),
    (r"\boxed{42} or \boxed{4", "42", 1),
    (r"} \boxed{42", "42", 0),
    (r"{{ \boxed{42}", "42", 1),
    (r"\boxed{\frac{3}{4}}", "0.75", 1),
    (r"\boxed{\text{New York}}", r"We find \boxed{New York}", 1),
    (r"\boxed{\{a\}}", r"\{a\}", 1),
    (r"<answer>It is \boxed{42}.</answer>", "42", 1),
    (r"<answer>41</answer> \boxed{42}", "42", 0),
    (r"\boxed{42} <answer>", "42", 0),
    (r"<answer>\(\mathrm{B}\)</answer>", "B", 1),
    (r"\fbox{42}", "42", 1),
    (r"\framebox{3}", "3", 1),
    (r"\framebox[2cm][c]{3}", "3", 1),
    (r"\fbox 3", "3", 1),
    (r"\boxed{41} or \fbox{42}", "42", 1),
    (r"\boxed{\fbox{42}}", "42", 1),
    (r"\boxed{\boxed{\boxed 42}}", "42", 1),
    (r"so \boxed 42", "42", 1),
    (r"so \boxed 42.", "42", 1),
    (r"so $\boxed 42$ it is", "42", 1),
    (r"so $\boxed 42$", "4", 0),
    (r"\(\boxed -3\) and \(x\)", "-3", 1),
    (r"\boxed 1{,}234 in all", "1234", 1),
    (r"\boxed E", "E", 1),
    (r"$\boxed \frac{3}{4}$", "0.75", 1),
    (r"\boxed{42}, which I put into \boxed for you", "42", 1),  # a mention is no answer
    (r"\boxed{42}, which I put into \boxedtext{41}", "42", 1),
    (r"\boxed{42}", r"$\boxed 42$", 1),
    (r"\boxed{42}", r"so $\boxed 42$ it is", 1),
    (r"\boxed{42}", r"\fbox{42}", 1),
    ("<answer>**42**</answer>", "42", 1),
    ("<answer>42.</answer>", "42", 1),
    # numbers in every notation
    ("<answer>-$3</answer>", "-3", 1),
    ("<answer>−$3</answer>", "3", 0),
    ("<answer>2.5e-3</answer>", "0.0025", 1),
    (r"\boxed{2.5 \times 10^{-3}}", "0.0025", 1),
    ("<answer>3×10⁵</answer>", "300,000", 1),
    ("<answer>12,34,567</answer>", "1234567", 1),
    (r"\boxed{1\,234}", "1234", 1),
    (r"\boxed{3\frac12}", "3.5", 1),
    ("<answer>10-15</answer>", "-15", 0),
    ("<answer>12/17/2024</answer>", "2024", 0),
    # percent
    (r"\boxed{75\%}", "75", 1),
    (r"\boxed{75\%}", "0.75", 1),
    (r"\boxed{75}", r"$75\%$", 1),
    (r"\boxed{0.75}", "75%", 1),
    (r"\boxed{0.75\%}", "75", 0),
    (r"\boxed{75 percent}", "75", 1),
    (r"\boxed{7.5\%}", "75", 0),
    # units
    (r"\boxed{12 apples}", "12", 1),
    (r"\boxed{12}", "12 apples", 1),
    (r"\boxed{12 apples}", "12 apple", 1),
    (r"\boxed{12 apples}", "12 pears", 0),
    (r"\boxed{12 apples}", "13", 0),
    (r"\boxed{12\text{ apples}}", "12", 1),
    (r"\boxed{12\,\mathrm{cm}^2}", "12", 1),
    (r"\boxed{12 km/h}", "12 km/h", 1),
    (r"\boxed{12 miles per hour}", "12", 1),
    (r"\boxed{90^\circ}", "90", 1),
    (r"\boxed{90°}", "90 degrees", 1),
    (r"\boxed{5 \text{ dollars}}", "$5", 1),
    (r"\boxed{12 x}", "12", 0),
    (r"\boxed{12ab}", "12", 0),
    (r"\boxed{12 million}", "12", 0),
    (r"\boxed{12 dozen}", "12", 0),
    (r"\boxed{12 or 13}", "12", 0),
    (r"\boxed{12 or more}", "12", 0),
    (r"\boxed{12 hours 5 minutes}", "12", 0),
    # words and choices
    (r"\boxed{yes}", "Yes", 1),
    (r"\boxed{\text{TRUE}}", "True", 1),
    (r"\boxed{Yes.}", "yes", 1),
    (r"\boxed{yes}", "no", 0),
    (r"\boxed{x}", "X", 0),
    (r"\boxed{E: text}", "E", 1),
    (r"\boxed{E}", "E: text", 1),
    (r"\boxed{E. text}", "E", 1),
    (r"\boxed{(E) text}", "(E)", 1),
    (r"\boxed{E) 5}", "E", 1),
    (r"\boxed{\textbf{(E)}\ 5}", "E", 1),
    ("<answer>Option E</answer>", "E", 1),
    (r"\boxed{D: text}", "E", 0),
    (r"\boxed{E: text}", "E: other", 0),
    (r"\boxed{E:D}", "E", 0),
    (r"\boxed{E - 1}", "E", 0),
    (r"\boxed{East}", "E", 0),
]


@pytest.mark.parametrize("completion, answer, score", ANSWERS)
def test_accuracy(completion, answer, score, monkeypatch):
    monkeypatch.setattr(accuracy, "_can_compare_formulas", lambda: False)
    assert one(rewards.accuracy_reward, completion, answer=answer) == score


NUMBERS = [
    ("\N{MINUS SIGN}3", -3),
    ("\N{FULLWIDTH HYPHEN-MINUS}3", -3),
    ("\N{EN DASH}5", -5),
    ("1e3", 1000),
    ("2.5e-3", 0.0025),
    ("1E+2 or 2.5E\N{MINUS SIGN}1", 0.25),
    (r"2.5 \times 10^{-3}", 0.0025),
    (r"3\cdot10^2", 300),
    ("3×10⁵", 300000),
    ("2 * 10**3", 2000),
    ("-$3", -3),
    ("$-3$", -3),
    (r"-\$1,234.50", -1234.5),
    ("-€2", -2),
    ("from 10-15", 15),
    ("from 10\N{EN DASH}15", 15),
    ("$10-$15", 15),
    ("10 - 15", 15),
    ("-10--15", -15),
    ("10%-15%", 15),
    ("(2)-3", 3),
    ("x-3", 3),
    ("x = -3", -3),
    ("f(-3)", -3),
    ("**-3**", -3),
    ("#### -3", -3),
    ("\n- 3 apples", 3),
    ("on 2024-05-17", 17),
    ("on 17/05/2024", 2024),
    ("COVID-19", 19),
    ("555-1234", 1234),
    ("v1.2.3", 3),
    ("8:30", 30),
    ("3/4", 0.75),
    ("-3/4", -0.75),
    ("2 1/2", 2.5),
    ("2½ cups", 2.5),
    ("1\n3/4", 0.75),
    (r"-\frac{3}{4}", -0.75),
    (r"\dfrac34", 0.75),
    ("75%", 75),
    ("1,234", 1234),
    ("12,34,567", 1234567),
    ("1, 2, 3", 3),
    ("1,2,3,4", 4),
    ("1,2345", 2345),
    (r"1{,}234", 1234),
    (r"1\,234", 1234),
    ("1\N{NARROW NO-BREAK SPACE}234", 1234),
    ("42.", 42),
    ("-.5", -0.5),
    ("5th", 5),
    ("１２", 12),
    ("1e400", math.inf),
    ("-1e400", -math.inf),
    ("1/0", None),
    ("1" * 101, None),
    ("x" * 5000 + " -7 " + "y" * 5000, -7),
    ("³", None),
    ("none", None),
    ("", None),
]


@pytest.mark.parametrize("written, value", NUMBERS)
def test_last_number(written, value):
    assert rewards.last_number(written) == value
    if value is not None and math.isfinite(value):
        assert one(rewards.numeric, f"41; {written}", answer=f"#### {value!r}") == 1
        assert one(rewards.numeric, f"41; {written}", answer=f"#### {-value!r}") == 0
        assert one(rewards.numeric, f"{value!r}", answer=written) == 1


def test_numeric_reads_percent_either_way():
    pairs = itertools.product(("75%", "75", "0.75", "0.75%"), repeat=2)
    unequal = {("75", "0.75"), ("75%", "0.75%"), ("75", "0.75%")}
    for given, truth in pairs:
        is_equal = not {(given, truth), (truth, given)} & unequal
        assert one(rewards.numeric, given, answer=truth) == is_equal, (given, truth)


@pytest.mark.parametrize("written, value", NUMBERS)
def test_one_parser(written, value):
    """Where a whole text is read as a number, it is the number that is found in it."""
    whole = quantities.parse_number(written)
    if whole is not None and not whole.unit:
        assert whole == quantities.find_last_number(written)


FORMULAS = [
    (r"\frac{\sqrt{4}}{4}", "1/2", 1),
    ("1+x", "x+1", 1),
    ("1+y", "x+1", 0),
    (r"\{1, 2\}", r"\{2, 1\}", 1),
    (r"\sqrt{16}", "4", 1),
    (r"\frac{1}{", "4", 0),
    ("((((", "4", 0),
]


@linux
def test_formulas_by_math_verify():
    pytest.importorskip("math_verify")
    given, answers, scores = zip(*FORMULAS, strict=True)
    assert rewards.accuracy_reward([f"<answer>{x}</answer>" for x in given], list(answers)) == list(scores)


@linux
def test_hanging_formula_costs_the_others_nothing():
    """From a thread too, where math-verify's own time limit would raise."""
    pytest.importorskip("math_verify")
    completions, got = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\sqrt{4}}"], []
    thread = threading.Thread(target=lambda: got.append(rewards.accuracy_reward(completions, ["7", "2"])))
    start = time.monotonic()
    thread.start()
    thread.join()
    assert got == [[0.0, 1.0]] and time.monotonic() - start < 10


@linux
def test_formulas_that_cannot_be_compared(monkeypatch):
    """The protocol with math-verify's process, without math-verify."""
    monkeypatch.setattr(accuracy, "_can_compare_formulas", lambda: True)
    completions = [r"\boxed{\sqrt{4}}", r"\boxed{\sqrt{9}}", r"\boxed{3}"]
    answers = ["2", "3", "3"]
    monkeypatch.setattr(accuracy, "run_python", lambda *_: (sandbox.STOPPED, "True\n"))
    with pytest.warns(RuntimeWarning, match="1 of 2 formulas"):
        assert rewards.accuracy_reward(completions, answers) == [1.0, None, 1.0]
    monkeypatch.setattr(accuracy, "run_python", lambda *_: (sandbox.FAILED, ""))
    with pytest.raises(RuntimeError, match="math-verify"):
        rewards.accuracy_reward(completions, answers)


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


# combining


def test_combine():
    def votes(completions, bonus, **_):
        return bonus

    both = rewards.combine(votes, rewards.format_reward, weights=[2, 0.5])
    assert both.__name__ == "votes+format_reward"
    completions = [R1.format("a", "b"), "x", R1.format("a", "b")]
    assert both(completions=completions, bonus=[1.0, None, None]) == [2.5, 0.0, 0.5]
    assert rewards.combine(votes, votes)(completions=["", ""], bonus=[None, math.nan]) == [None, None]
    with pytest.raises(ValueError, match="reward function 'votes': expected 2 rewards"):
        both(completions=["", ""], bonus=[1.0])


def test_by_column():
    def lengths(completions, prompts, bonus, trainer_state, **_):
        assert len(prompts) == len(bonus) == len(completions) and trainer_state == "state"
        return [len(completion) + more for completion, more in zip(completions, bonus, strict=True)]

    chosen = rewards.by_column("kind", {"long": lengths, "tags": rewards.format_reward})
    assert chosen.__name__ == "format_reward|lengths"
    arguments = dict(completions=["ab", R1.format("", ""), "abc", "d"], prompts=list("pqrs"), trainer_state="state")
    kinds = ["long", "tags", "long", None]
    assert chosen(**arguments, kind=kinds, bonus=[10, 0, 20, 0]) == [12.0, 1.0, 23.0, None]
    with pytest.raises(ValueError, match="dataset: expected a column 'kind', got bonus, prompts, trainer_state"):
        chosen(**arguments, bonus=[0] * 4)
    with pytest.raises(ValueError, match="reward function 'short': expected 1 rewards, one per completion, got 0"):
        rewards.by_column("kind", {None: named("short", lambda **_: [])})(**arguments, kind=kinds)
    with pytest.raises(ValueError, match="at least one function"):
        rewards.by_column("kind", {})


def named(name, function):
    function.__name__ = name
    return function


NAMES = (
    "name",
    "func",
    "trainer_state",
    "log_metric",
    "log_extra",
    "completion_ids",
    "self",
    "a b",
    "function",
    "column",
)


def test_columns_share_no_namespace_with_our_parameters():
    rows = [{"prompt": "p", "completion": "c", "answer": i} | {name: f"{name}{i}" for name in NAMES} for i in range(2)]
    with pytest.warns(UserWarning, match="do not get the dataset's trainer_state, log_metric, log_extra, since"):
        arguments = rewards.reward_arguments(
            rows, ["p", "p"], [[1], [2]], trainer_state="state", log_metric=print, log_extra=print
        )
    assert arguments["completion_ids"] == [[1], [2]] and arguments["trainer_state"] == "state"
    assert {"completions", "prompt", "completion"}.isdisjoint(arguments)

    def judge(prompts, completions, completion_ids, name, func, trainer_state, log_metric, log_extra, **columns):
        assert trainer_state == "state" and log_metric is log_extra is print
        assert [len(x) for x in (prompts, completion_ids, name, func, *columns.values())] == [len(completions)] * (
            4 + len(columns)
        )
        return [float(value[-1]) for value in name]

    for function in (judge, rewards.combine(judge), rewards.by_column("func", {"func0": judge, "func1": judge})):
        assert rewards.call_reward_func(function, "judge", ["", ""], **arguments) == [0.0, 1.0]
    assert rewards.by_column("name", {"name1": judge})(completions=["", ""], **arguments) == [None, 1.0]


def test_columns_named_as_our_parameters_in_evaluation_and_training(tmp_path):
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer, 0)
    reserved = ("trainer_state", "log_metric", "log_extra", "completion_ids")
    names = ("name", "func", *reserved)
    rows = Dataset.from_list(
        [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} | dict.fromkeys(names, i) for i in range(4)]
    )

    def judge(completions, name, func, completion_ids, **_):
        assert name == func and all(isinstance(ids, list) for ids in completion_ids)
        return name

    with pytest.warns(UserWarning, match="do not get the dataset's trainer_state"):
        samples = evaluate.sample(model, tokenizer, rows, {"judge": judge}, 2)
    assert samples.scores == {"judge": [0.0, 1.0, 2.0, 3.0]}
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=2, max_steps=1,
        logging_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(model, [judge, functools.partial(judge)], args, rows, processing_class=tokenizer)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"rewards/judge_1/mean", "rewards/judge_2/mean"} <= logged


def _named_like(name):
    return named(name, lambda completions, **_: [0.0] * len(completions))


class Callable_:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)


partial = functools.partial
FUNCTION_NAMES = [
    ([rewards.exact], ["exact"]),
    ([partial(rewards.exact), partial(rewards.numeric)], ["exact", "numeric"]),
    ([partial(partial(rewards.exact), x=1)], ["exact"]),
    ([partial(Callable_())], ["Callable_"]),
    ([Callable_(), Callable_()], ["Callable__1", "Callable__2"]),
    ([partial(rewards.exact), rewards.numeric, rewards.exact], ["exact_1", "numeric", "exact_2"]),
    ([_named_like("f"), _named_like("f"), _named_like("f_1")], ["f_2", "f_3", "f_1"]),
    ([rewards.repetition_penalty_reward(2), rewards.repetition_penalty_reward(3)],
     ["repetition_penalty_1", "repetition_penalty_2"]),
]  # fmt: skip


@pytest.mark.parametrize("functions, names", FUNCTION_NAMES)
def test_names_of_functions(functions, names):
    assert rewards.as_reward_list(functions) == (functions, names)
    if len(names) == 1:  # TRL's, for each alone
        trl_utils = pytest.importorskip("trl.trainer.utils")
        assert names == [trl_utils.get_callable_name(functions[0])]
    assert rewards.by_column("kind", dict(enumerate(functions))).__name__ == "|".join(
        sorted({rewards.reward_name(function) for function in functions})
    )


def test_partial_of_an_async_function_is_refused():
    class Late:
        async def __call__(self, **_):
            return []

    with pytest.raises(TypeError, match="async"):
        rewards.as_reward_list([partial(Late())])


SEQUENCES = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "array of one column": lambda scores: np.array(scores)[:, None],
    "fp16 array": lambda scores: np.array(scores, np.float16),
    "integers": lambda scores: np.array(scores).astype(int),
    "booleans": lambda scores: np.array(scores) > 1,
    "array module": lambda scores: array.array("d", scores),
    "Series": lambda scores: pytest.importorskip("pandas").Series(scores, index=[7, 8, 9]),
    "deque": collections.deque,
    "tensor": torch.tensor,
    "tensor with a gradient": lambda scores: torch.tensor(scores, requires_grad=True),
    "bf16 tensor": lambda scores: torch.tensor(scores, dtype=torch.bfloat16),
    "tensors": lambda scores: [torch.tensor(score) for score in scores],
    "scalars": lambda scores: [np.float32(score) for score in scores],
    "fractions": lambda scores: [Fraction(score) for score in scores],
    "decimals": lambda scores: [Decimal(score) for score in scores],
    "generator": iter,
    "values": lambda scores: dict(enumerate(scores)).values(),
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_any_sequence_of_numbers_is_rewards(kind):
    made = SEQUENCES[kind]([1.0, 0.0, 2.0])
    scores = rewards.call_reward_func(lambda **_: made, "judge", ["", "", ""])
    assert scores == ([0, 0, 1] if kind == "booleans" else [1, 0, 2]) and {type(score) for score in scores} == {float}


NO_REWARDS = [
    (1.0, "got float"),
    (None, "got NoneType"),
    ("abc", "got str"),
    ({0: 1.0, 1: 1.0, 2: 1.0}, "got dict"),
    ({1.0, 2.0, 3.0}, "got set"),
    (np.array(1.0), "got ndarray"),
    (torch.tensor(1.0), "got Tensor"),
    (np.zeros(2), "got 2 in ndarray"),
    (np.zeros((1, 3)), "got 1 in ndarray"),
    (np.zeros((3, 2)), r"got ndarray with ndarray array\(\[0., 0.\]\) as element 0"),
    (collections.deque([1.0]), "got 1 in deque"),
    ([1.0, "1", 2.0], "each a number or None, got list with str '1' as element 1"),
    ([1.0, 2.0, [3.0]], r"got list with list \[3.0\] as element 2"),
    ([1.0, 2.0, 1j], "got list with complex 1j as element 2"),
    (np.array([1, None, "x"], object), "got ndarray with str 'x' as element 2"),
    ([1.0, 2.0, {}], "got list with dict {} as element 2"),
    ([10**400, 0, 0], "got list with int 1000.* as element 0"),
]


@pytest.mark.parametrize("made, message", NO_REWARDS)
def test_what_is_no_reward_is_named(made, message):
    with pytest.raises(
        ValueError, match=f"reward function 'judge': expected 3 rewards, one per completion.*{message}"
    ):
        rewards.call_reward_func(lambda **_: made, "judge", ["", "", ""])


def test_error_of_a_functions_own_is_its_own():
    def judge(**_):
        yield 1.0
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        rewards.call_reward_func(judge, "judge", ["", ""])


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


# TRL's calling convention


def every_reward():
    return {
        **rewards.BUILT_IN,
        "language": rewards.language_consistency_reward("en"),
        "overlong": rewards.soft_overlong_reward(8, 4),
        "combined": rewards.combine(rewards.format_reward, rewards.accuracy_reward),
    }


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("name", every_reward())
def test_called_as_trl_does(name, conversational):
    if name == "code" and sys.platform != "linux":
        pytest.skip("the sandbox needs Linux")
    reward = every_reward()[name]
    texts = [R1.format("two words", "42"), R1.format("why", block(DOUBLE)), "", "<think>"]
    prompts = [[{"role": "user", "content": "?"}]] * 4 if conversational else ["?"] * 4
    scores = reward(
        prompts=prompts,
        completions=[message(text) for text in texts] if conversational else texts,
        completion_ids=[[1, 2], [1] * 9, [], [3]],
        answer=["42", "42", "42", None],
        test_cases=[["assert True"], DOUBLES, [], None],
        language=["en"] * 4,
        trainer_state=None,
        log_metric=lambda *_: None,
        log_extra=lambda *_: None,
    )
    assert isinstance(scores, list) and len(scores) == 4
    assert all(score is None or isinstance(score, float) for score in scores)
    assert reward.__name__
    first = dict(exact=0, numeric=1, contains=1, accuracy=1, format=1, tag_count=1, language=1, combined=2)
    assert scores[0] == first.get(name, 0)


def test_in_trl(tmp_path):
    """A step of TRL's own GRPOTrainer with rewards that abstain, one without."""
    trl = pytest.importorskip("trl")
    tokenizer = embedded.make_tokenizer()
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i) if i % 2 else None} for i in range(8)]
    args = trl.GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    functions = [rewards.accuracy_reward, rewards.tag_count_reward, rewards.soft_overlong_reward(4, 2)]
    trainer = trl.GRPOTrainer(
        embedded.make_model(tokenizer, 0), functions, args, Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {f"rewards/{function.__name__}/mean" for function in functions} <= logged
