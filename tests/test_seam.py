"""The seam that integrations stand on, at a package made for these tests."""

import importlib
import sys
import threading
import warnings

import pytest

from fastgrpo.integrations import seam
from fastgrpo.integrations.seam import NotHonoured, Package, Patch, Place, held_in, in_place

LOSSES = """
import torch

def token_logps(logits, ids, temperature=1.0):
    return "theirs"

class Head:
    def forward(self, hidden, labels):
        return "theirs"

    @staticmethod
    def kind():
        return "theirs"

class Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight):
        return "theirs"
"""
TRAINER = "from theirs.losses import token_logps\n\ndef logps():\n    return token_logps(None, None)\n"
THEIRS = Package("theirs", title="Theirs", versions="2.0 to 2.3")
SIGNATURES = {"token_logps": ["logits", "ids", "temperature"], "Head": ["hidden", "labels"],
              "Chunked": ["hidden", "weight"]}  # fmt: skip


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """(its module of losses, a module of it that has a function by name); version 2.1rc3."""
    for name, text in (("__init__", ""), ("losses", LOSSES), ("trainer", TRAINER)):
        (tmp_path / "theirs").mkdir(exist_ok=True)
        (tmp_path / "theirs" / f"{name}.py").write_text(text)
    (tmp_path / "theirs-2.1rc3.dist-info").mkdir()
    (tmp_path / "theirs-2.1rc3.dist-info" / "METADATA").write_text("Name: theirs\nVersion: 2.1rc3\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("theirs.losses"), importlib.import_module("theirs.trainer")
    for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[name]


def ours(*_):
    return "ours"


def test_a_patch_is_put_once_and_taken_back(theirs):
    losses, trainer = theirs
    places = [
        *held_in("theirs", "token_logps", losses.token_logps, ours),
        Place(losses.Head, "forward", ours),
        Place(losses.Head, "kind", staticmethod(ours)),
    ]
    before = [vars(owner)[name] for owner, name, _ in places]
    calls = [
        lambda: losses.token_logps(0, 0),
        trainer.logps,
        lambda: losses.Head().forward(0, 0),
        lambda: losses.Head.kind(),
    ]
    patch = Patch(lambda: places)
    assert [call() for call in calls] == ["theirs"] * 4
    with pytest.raises(KeyError):
        with patch.put() as put:
            assert put.put() is patch  # a second time changes nothing
            assert [call() for call in calls] == ["ours"] * 4
            names = "theirs.losses.token_logps, theirs.trainer.token_logps, theirs.losses.Head.forward, "
            assert str(patch) == names + "theirs.losses.Head.kind"
            raise KeyError
    assert [call() for call in calls] == ["theirs"] * 4
    assert all(vars(owner)[name] is was for (owner, name, _), was in zip(places, before, strict=True))
    patch.take_back()
    assert str(patch) == ""


def test_what_is_put_for_a_call_gives_back_the_patch(theirs):
    losses, _ = theirs
    with Patch(lambda: [Place(losses, "token_logps", ours)]).put():
        with in_place([Place(losses, "token_logps", lambda: "for a call")]):
            assert losses.token_logps() == "for a call"
        assert losses.token_logps() == "ours"


@pytest.mark.parametrize("way", ["patch", "call"])
def test_all_places_or_none(theirs, way):
    losses, _ = theirs
    places = [Place(losses, "token_logps", ours), Place(losses, "not_there", ours)]
    with pytest.raises(KeyError, match="not_there"):
        with Patch(lambda: places).put() if way == "patch" else in_place(places):
            pass
    assert losses.token_logps(0, 0) == "theirs" and not hasattr(losses, "not_there")


def test_a_patch_waits_for_a_call_of_another_thread(theirs):
    losses, _ = theirs
    patch = Patch(lambda: [Place(losses, "token_logps", ours)])
    thread = threading.Thread(target=patch.put)
    with in_place([Place(losses, "token_logps", lambda *_: "for a call")]):
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive() and losses.token_logps(0, 0) == "for a call"
    thread.join(timeout=10)
    assert losses.token_logps(0, 0) == "ours"
    patch.take_back()
    assert losses.token_logps(0, 0) == "theirs"


def test_a_module_with_all_that_it_has_to_have(theirs):
    assert THEIRS.module("theirs.losses", takes=SIGNATURES, has=["torch"]) is theirs[0]


@pytest.mark.parametrize(
    "name, takes, has, problem",
    [
        ("theirs.moved", {}, (), "No module named 'theirs.moved'"),
        ("theirs.losses", {"moved": []}, (), "no attribute 'moved'"),
        ("theirs.losses", {}, ["moved"], "no attribute 'moved'"),
        (
            "theirs.losses",
            {"token_logps": ["logits"]},
            (),
            "token_logps takes logits, ids, temperature, expected logits",
        ),
        ("theirs.losses", {"Head": ["hidden"]}, (), "Head takes hidden, labels, expected hidden"),
        ("theirs.losses", {"Chunked": ["ctx"]}, (), "Chunked takes hidden, weight, expected ctx"),
    ],
)
def test_what_differs_is_refused(theirs, name, takes, has, problem):
    with pytest.raises(RuntimeError) as refused:
        THEIRS.module(name, takes=takes, has=has)
    head = f"fastgrpo {seam.__version__} fits Theirs 2.0 to 2.3; Theirs 2.1rc3 differs, and nothing is changed: "
    assert str(refused.value).startswith(head) and problem in str(refused.value)


def test_a_package_that_is_not_there():
    with pytest.raises(RuntimeError, match="fits Nowhere 1; no version is installed here, .* No module"):
        Package("nowhere", title="Nowhere", versions="1").module("nowhere.losses", takes={})


@pytest.mark.parametrize(
    "release, known", [((2, 1), True), ((2, 0), True), ((2,), True), ((2, 2), False), ((3,), False)]
)
def test_versions(theirs, release, known):
    assert THEIRS.is_at_least(*release) is known


def test_what_is_left_to_the_package_is_said_once(theirs):
    who, other = theirs[0].Head(), theirs[0].Head()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for each in (who, who, other):
            THEIRS.leave(each, NotHonoured("clip_mode=3"))
        THEIRS.leave(who, NotHonoured("Head overrides kind"))
    left = "fastgrpo leaves this to Theirs: "
    assert [str(w.message) for w in said] == [f"{left}clip_mode=3"] * 2 + [f"{left}Head overrides kind"]
    assert {w.category for w in said} == {RuntimeWarning}
