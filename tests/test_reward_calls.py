"""How reward functions are called, named and combined, and what they may return; TRL's calls."""

import array
import collections
import functools
import math
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_code_reward import DOUBLE, DOUBLES, block, message
from test_rewards import R1

from fastgrpo import rewards
from fastgrpo.recipes import sums
from fastgrpo.trainer import GRPOConfig, GRPOTrainer, evaluate

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
    tokenizer = sums.make_tokenizer()
    model = sums.make_model(tokenizer, 0)
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
    tokenizer = sums.make_tokenizer()
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
        sums.make_model(tokenizer, 0), functions, args, Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {f"rewards/{function.__name__}/mean" for function in functions} <= logged
