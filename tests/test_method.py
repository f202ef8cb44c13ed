"""Specs as text and back, hints for slips, what may be combined, and methods that users write."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import typing
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dense
import slots
from longspan.core import method as method_module
from longspan.core.facts import facts_of
from longspan.core.method import Combination, Method, NoMethod, catalogue, combination, find, parse, read_settings
from longspan.positions.rope_scaling import YaRN
from longspan.util.errors import LongspanError, NotSupported, SpecError
from longspan.util.units import read_size

CLOSEST = {
    "yarm:factor=4": 'did you mean "yarn"?',
    "yarn:faktor=4": 'did you mean "factor"?',
    "streamin": 'did you mean "streaming"?',
    "NTK": "choose from",
    "self_extend": 'did you mean "self-extend"?',
}


def of(name: str) -> st.SearchStrategy[Method]:
    """Valid settings of a method: its own examples, or drawn field by field."""
    if examples := catalogue()[name].examples:
        return st.sampled_from(examples).map(lambda spec: parse(spec).methods[0])
    sizes, numbers = st.integers(1, 2**16), st.floats(1, 4096, allow_nan=False)
    special = {
        "sinks": st.integers(0, 100),
        "slow": st.floats(0.01, 5),
        "low": st.floats(0.01, 3),
        "fast": st.floats(6, 500),
        "high": st.floats(3.5, 50),
        "ramp": st.sampled_from(["code", "paper"]),
        "factor": numbers,
        "step": sizes,
        "group": st.none() | sizes,
        "window": st.integers(2, 2**16) if name == "longformer" else st.none() | st.integers(2, 2**16),
        "size": st.none() | st.integers(1, 2**16).map(lambda half: 2 * half),
    }
    even = st.integers(1, 64).map(lambda n: 4 * n)
    special |= {
        "theta": st.floats(2, 1e7),
        "base": st.floats(2, 1e7),
        "share": st.floats(0.1, 1),
    }
    special |= {"scale_base": numbers, "gamma": numbers, "width": even, "buckets": even, "far": st.integers(200, 4096)}
    special |= {"dt_min": st.floats(1e-4, 1e-2), "dt_max": st.floats(0.05, 1), "lr": st.none() | st.floats(1e-5, 1)}
    special |= {"expansion": st.floats(0.5, 4), **({"size": even} if name in ("gau", "flash") else {})}
    special |= {"globals": st.integers(0, 2), "among": st.none() | st.integers(256, 4096)}
    special |= {"segments": st.sampled_from(["2k/4k", "64/100"]), "dilations": st.sampled_from(["1/2", "1/64"])}
    if name == "landmark":  # the chunk is whole blocks
        special |= {"block": st.sampled_from([1, 2, 4])}
    if name == "unlimiformer":  # what faiss takes is tested with it
        special |= {"window": st.none() | st.integers(4, 2**16), "overlap": st.floats(0, 0.99)}
        special |= {"search": st.just("torch"), "probes": st.none()}
    if name == "focused":
        special |= {"layers": st.none() | st.sampled_from(["1", "6/12/18"]), "search": st.just("torch")}
        special |= {"late": st.none(), "after": st.none()}  # both or neither
    cls = catalogue()[name]
    hints = typing.get_type_hints(cls)
    choices = {name for name, hint in hints.items() if typing.get_origin(hint) is Literal} - {"search"}
    drawn = {
        f.name: special[f.name] if f.name in special.keys() - choices else of_type(hints[f.name])
        for f in dataclasses.fields(cls)
    }
    return st.builds(partial(allowed, cls, drawn.keys() - special), **drawn)


def allowed(cls: type[Method], by_type: Set[str], /, **settings: Any) -> Method:
    """A method with these settings; with its defaults where it refuses them and some were drawn by their type alone."""
    try:
        return cls(**settings)
    except SpecError:
        if not by_type:
            raise
        return cls()


def of_type(hint: Any) -> st.SearchStrategy:
    """Values of a choice, a number, or a switch."""
    if float in (hint, *typing.get_args(hint)):
        return st.floats(0.01, 64)
    if int in (hint, *typing.get_args(hint)):
        return st.integers(1, 64).map(lambda n: 4 * n)
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    return st.booleans() if hint is bool else st.none() | st.booleans()


DRAWABLE = [name for name in catalogue() if name != "longrope" and catalogue()[name].__module__.startswith("longspan.")]


@pytest.mark.parametrize("name", DRAWABLE)
def test_examples_are_two(name: str) -> None:
    assert len(catalogue()[name].examples) in (0, 2), "one that changes a tiny model's logits, one that changes nothing"


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip(data: st.DataObject) -> None:
    """A spec reads back as the method that wrote it, to twelve digits, and then as itself."""
    one = data.draw(st.sampled_from(DRAWABLE).flatmap(of))
    again = parse(one.spec).methods[0]
    for field in dataclasses.fields(one):
        before, after = getattr(one, field.name), getattr(again, field.name)
        assert after == (pytest.approx(before, rel=1e-11) if isinstance(before, float) else before)
    assert type(again) is type(one) and again.spec == one.spec and parse(again.spec).methods == (again,)


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_text_is_read_or_refused(text: str) -> None:
    for wild in (text, f"yarn:{text}", f"yarn:factor={text}", f"streaming:window={text}", f"ntk:factor=2 + {text}"):
        with contextlib.suppress(LongspanError):
            made = parse(wild)
            assert parse(made.spec) == made


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", "none"),
        (" yarn : factor = 4 ", "yarn:factor=4"),
        ("yarn:factor=4,", "yarn:factor=4"),
        ("yarn:ramp=code,slow=1", "yarn"),
        ("yarn:factor=4.0", "yarn:factor=4"),
        ("yarn:factor=none", "yarn"),
        ("streaming:window=4k", "streaming:window=4096"),
        ("streaming:window=0.5K", "streaming:window=512"),
        ("ntk:factor=8+streaming:window=4k", "ntk:factor=8 + streaming:window=4096"),
        ("none + yarn:factor=2", "yarn:factor=2"),
        ("self-extend:group=4", "self-extend:group=4"),
    ],
)
def test_spec(text: str, spec: str) -> None:
    assert parse(text).spec == spec == parse(spec).spec


@pytest.mark.parametrize(("text", "hint"), CLOSEST.items())
def test_slips_get_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text)
    assert hint in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a method is written"),
        ("   ", "a method is written"),
        ("+", "no method name"),
        ("yarn:factor=2 +", "no method name"),
        (":factor=2", "no method name"),
        ("yarn:", "nothing after the colon"),
        ("yarn:factor", "'factor' is not key=value"),
        ("yarn:factor=", "'factor=' is not key=value"),
        ("yarn:factor=2,factor=3", "factor is given twice"),
        ("yarn:factor=two", "must be a finite number, not 'two'"),
        ("yarn:factor=nan", "must be a finite number"),
        ("yarn:factor=inf", "must be a finite number"),
        ("yarn:ramp=linear", "ramp must be one of code, paper, not 'linear'"),
        ("streaming:window=4.5", "must be a whole number such as 4096 or 4k, not '4.5'"),
        ("streaming:sinks=none", "must be a whole number"),
        ("none:factor=2", "it has no settings"),
    ],
)
def test_what_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(text)
    assert said in str(error.value)


@pytest.mark.parametrize("thing", [3, None, 2.5, [None], [3]])
def test_what_is_no_method(thing: object) -> None:
    with pytest.raises(SpecError, match="a method is a spec string or a Method, not"):
        combination(thing)  # type: ignore[arg-type]


def test_whatever_a_user_hands_over() -> None:
    both = combination(["ntk:factor=2", method_module.parse("streaming").methods[0]])
    assert both.spec == "ntk:factor=2 + streaming" == combination(both).spec == combination(iter(both.methods)).spec
    assert combination(YaRN(4)) == parse("yarn:factor=4") == combination("yarn:factor=4")
    assert combination([]).spec == "none" and combination(NoMethod()).spec == "none"


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("4k", 4096), ("4K", 4096), ("1m", 1048576), ("1.5k", 1536), ("1e3", 1000), ("0", 0), (" 7 ", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "k", "4.5", "4kb", "1_000", "nan", "inf", "1e300", "0.3k", "four", "4 k k", "٤k_"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SpecError, match="length must be a whole number"):
        read_size(text)


# Combinations.


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations_with_replacement(DRAWABLE, 2)])
def test_two_methods_combine_unless_they_share_a_slot(first: str, second: str) -> None:
    methods = catalogue()
    shared = methods[first].slots & methods[second].slots
    if not shared:
        assert {m.name for m in parse(f"{first} + {second}").methods} >= {first, second} - {"none"}
        return
    with pytest.raises(NotSupported) as error:
        parse(f"{first} + {second}")
    assert f"{first} and {second} cannot be combined" in str(error.value)
    assert all(slot in str(error.value) for slot in shared)
    names = str(error.value).rpartition("combines with: ")[2]
    for name in names.split(", ") if "combines with" in str(error.value) else ():
        assert parse(f"{first} + {name}") if name != "longrope" else not methods[name].slots & methods[first].slots


def test_a_combination_reaches_as_far_as_its_furthest() -> None:
    facts = facts_of(dense.llama(window=1000).config)
    assert parse("ntk:factor=8").reach(facts) == 4000
    assert parse("ntk:factor=8 + streaming").reach(facts) is None
    assert parse("pi:factor=2 + self-extend:group=4,window=200").reach(facts) == 3400
    assert parse("none").reach(facts) == 1000


def test_a_combination_resolves_each_part() -> None:
    facts = facts_of(dense.llama(window=1000).config)
    assert parse("ntk + streaming").resolve(facts, 4000).spec == "ntk:factor=8 + streaming:window=996"
    with pytest.raises(SpecError, match="ntk needs factor"):
        parse("ntk + streaming").resolve(facts)
    assert parse("yarn:factor=2").exportable and not parse("yarn:factor=2 + streaming").exportable


# The catalogue.


def test_every_method_says_what_it_is() -> None:
    for name, cls in catalogue().items():
        assert name == cls.name and cls.title and cls.cost and cls.__doc__
        assert cls.exportable or cls.why_not_exportable
        assert name == "none" or (cls.paper and cls.slots)


@pytest.fixture
def forgets_new_methods() -> Iterator[None]:
    before = dict(method_module.Method.registry)
    yield
    method_module.Method.registry.clear()
    method_module.Method.registry.update(before)


@pytest.mark.usefixtures("forgets_new_methods")
def test_a_subclass_is_in_the_catalogue() -> None:
    @dataclass(frozen=True)
    class Mine(Method):
        """A method of a user's."""

        depth: int = 3
        loud: bool = False
        kind: Literal["a", "b"] = "a"
        share: float | None = None

        name: ClassVar[str] = "mine"
        slots: ClassVar[frozenset[str]] = frozenset({"attention"})

    assert catalogue()["mine"] is Mine
    made = parse("mine:depth=2k,loud=true,kind=b,share=0.25").methods[0]
    assert made == Mine(2048, True, "b", 0.25) and made.spec == "mine:depth=2048,loud=true,kind=b,share=0.25"
    assert parse("mine:share=none,loud=FALSE").methods[0] == Mine()
    with pytest.raises(SpecError, match="mine: loud must be true or false, not '1'"):
        parse("mine:loud=1")
    with pytest.raises(NotSupported, match="mine and streaming cannot be combined: both take the model's attention"):
        parse("mine + streaming")
    with pytest.raises(TypeError, match="two methods are named 'mine'"):
        type("Other", (Method,), {"name": "mine", "__module__": "elsewhere"})


@pytest.mark.usefixtures("forgets_new_methods")
def test_a_base_without_a_name_is_not_in_the_catalogue() -> None:
    before = set(catalogue())
    type("Base", (Method,), {})
    assert set(catalogue()) == before


def test_settings_of_any_dataclass_are_read_alike() -> None:
    @dataclass
    class Task:
        count: int = 1
        text: str = ""

    assert read_settings(Task, "task", "count=2k, text=a=b") == Task(2048, "a=b")
    with pytest.raises(SpecError, match=r"task has no setting 'cuont'; did you mean \"count\""):
        read_settings(Task, "task", "cuont=1")


def test_combinations_are_compared_by_what_they_are() -> None:
    assert parse("yarn:factor=4") == Combination((YaRN(4.0),)) != parse("yarn:factor=2")


def test_the_table_of_slots_is_that_of_the_catalogue() -> None:
    page = slots.PAGE.read_text(encoding="utf-8")
    assert slots.renewed(page) == page, "make tables"
    assert "| `frequencies` | " in page and "`yarn`" in slots.table()


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("reformer", "lsh"),
        ("led:window=64", "longformer:window=64"),
        ("favor", "performer"),
        ("favor+", "performer"),
        ("FAVOR+:features=64", "performer:features=64"),
        ("StreamingLLM:sinks=4,window=60", "streaming:sinks=4,window=60"),
        ("attention_sinks:sinks=4,window=60 + yarn:factor=2", "streaming:sinks=4,window=60 + yarn:factor=2"),
        ("position-interpolation:factor=2", "pi:factor=2"),
        ("RoFormer", "rope"),
        ("transfo-xl", "transformer-xl"),
        ("sliding-window:size=8", "window:size=8"),
        ("fot", "focused"),
        ("T5Bias", "t5"),
    ],
)
def test_methods_go_by_their_papers_names_too(text: str, spec: str) -> None:
    assert parse(text).spec == parse(spec).spec
    assert parse(parse(text).spec) == parse(spec)


def test_no_name_is_two_methods() -> None:
    known = catalogue()
    names: dict[str, str] = {}
    for own, cls in known.items():
        for name in (own, cls.__name__, *cls.also, *cls.near):
            assert names.setdefault(re.sub("[-_ ]", "", name.lower()), own) == own, name
        for name in (own, *cls.also):
            assert find(name, "method", known) == own
        for name in cls.near:
            with pytest.raises(SpecError, match=rf"no method '{name}'; the nearest here is {own} \("):
                find(name, "method", known)
