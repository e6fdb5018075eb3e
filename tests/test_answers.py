"""Answers and numbers: tables of what a completion may say against what is right; formulas."""

import itertools
import math
import threading
import time

import pytest
from test_code_reward import linux, message
from test_rewards import R1, one

from fastgrpo import rewards
from fastgrpo.rewards import accuracy, quantities, sandbox

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
