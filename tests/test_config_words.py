"""What a wrong configuration is told: in our own words, with what nobody has set, and never in those of a library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.config import load_config, load_study, parse_overrides
from fedpeft.config.load import defaults_of, naming_defaults
from fedpeft.config.reading import parse_yaml
from fedpeft.config.sections import SECTIONS
from fedpeft.core.errors import ConfigError, DataError

EXAMPLES = Path(__file__).parents[1] / "examples"
LEAKS = re.compile(
    r"Field required|Input should|should have|should be|validation error|pydantic|type=|<block|YAMLError"
)
METHODS = [{"label": "a", "name": "fedavg"}]


def problems(load: Any, *arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return list(caught.value.problems)


# --- wrong values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"task": {"labels": ["one"]}}, "task.labels: ['one'] cannot be used; give at least 2 entries."),
        (
            {"task": {"classes": ["a"]}},
            "task.classes: ['a'] cannot be used; give at least 2 entries, or a whole number.",
        ),
        ({"task": {"labels": 3}}, "task.labels: 3 cannot be used; give a list."),
        ({"task": {"max_length": 2}}, "task.max_length: 2 cannot be used; give at least 3."),
        ({"task": {"text": ""}}, "task.text: '' cannot be used; give text that is not empty."),
        ({"run": {"stop": 3}}, "run.stop: 3 cannot be used; give a mapping of keys to values."),
        ({"run": {"stop": {"score": "x"}}}, "run.stop.score: 'x' cannot be used; give a number."),
        ({"run": {"quorum": 0}}, "run.quorum: 0 cannot be used; give a number above 0."),
        ({"adapter": {"rank": "x"}}, "adapter.rank: 'x' cannot be used; give a whole number."),
        ({"adapter": {"targets": "query"}}, "adapter.targets: 'query' cannot be used; give a list."),
    ],
)
def test_values_are_refused_with_what_is_allowed(source: dict[str, Any], problem: str) -> None:
    assert problems(load_config, source) == [problem]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ({}, ["methods: is missing; give it: the methods to compare."]),
        ({"methods": []}, ["methods: [] cannot be used; give at least 1 entry."]),
        (
            {"methods": [*METHODS, {"name": "fedavg"}, {"label": "", "name": "local"}]},
            [
                "methods, entry 2, label: is missing; give it: what tables and folders call it.",
                "methods, entry 3, label: '' cannot be used; give text that is not empty.",
            ],
        ),
        (
            {"methods": METHODS, "grid": {"method.lr": []}},
            ["grid.method.lr: [] cannot be used; give at least 1 entry."],
        ),
        (
            {"methods": METHODS, "target": {"share_of": "a", "shares": 1}},
            ["target.shares: unknown key; did you mean 'share'?"],
        ),
        ({"methods": METHODS, "tasks": 3}, ["tasks: 3 cannot be used; give a list."]),
        (
            {"methods": METHODS, "folder": "x"},
            ["folder: unknown key; known are base, tasks, methods, seeds, grid, target."],
        ),
    ],
)
def test_studies_are_told_in_the_same_words(source: dict[str, Any], found: list[str]) -> None:
    assert problems(load_study, source) == found


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = [(name, key) for name, section in SECTIONS.items() for key in section.model_fields]


@given(st.sampled_from(KEYS), ANYTHING)
@settings(deadline=None, max_examples=300)
def test_no_library_speaks_to_people(place: tuple[str, str], value: Any) -> None:
    name, key = place
    try:
        load_config({name: {key: value}})
    except ConfigError as error:
        for problem in error.problems:
            own = problem.replace(repr(value), "")
            assert not LEAKS.search(own), problem
            assert problem.startswith(
                (f"{name}.{key}", "method.", "adapter", "partition.", "task.", "run.", "proxy.")
            ), problem


@given(st.sampled_from(["base", "tasks", "methods", "seeds", "grid", "target"]), ANYTHING)
@settings(deadline=None, max_examples=200)
def test_no_library_speaks_to_people_about_studies(key: str, value: Any) -> None:
    try:
        load_study({"methods": METHODS, key: value})
    except ConfigError as error:
        for problem in error.problems:
            assert problem.startswith(key) and not LEAKS.search(problem.replace(repr(value), "")), problem


def test_long_values_are_cut() -> None:
    (problem,) = problems(load_config, {"run": {"rounds": "x" * 500}})
    assert problem.startswith("run.rounds: 'xxx") and problem.endswith("... cannot be used; give a whole number.")
    assert len(problem) < 150


# --- text that is no YAML ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: b: c", "line 1, column 5: there is a second `:`, or the line is indented wrongly; quote text with `: `."),
        ("run:\n  rounds: 3\n seed: 1", "line 3, column 2: indented otherwise than the lines above"),
        ("run:\n\trounds: 3", "line 2, column 1: a tab; indent with spaces."),
        ("a: 1\nb: [1, 2\nc: 3", "line 2, column 4: a list that is opened here is not closed; close it"),
        ("a: {b: 1", "line 1, column 4: a mapping that is opened here is not closed; close it"),
        ("a: 'x\nb: 3", "line 1, column 4: a quote that is opened here is not closed; close it."),
        ("a: @b", "line 1, column 4: a character that begins no value; put the text in quotes."),
        ("a: *b", "line 1, column 4: `*` refers to something that is not there;"),
        ("a: !!python/object:os.system {}", "line 1, column 4: `!` begins a tag, and tags are not read;"),
        ("a: !!int x", "a value does not fit its tag"),
        ("a: 1\na: 2", "line 2, column 1: the key 'a' stands twice; remove one."),
        ("? [1]\n: 2", "line 1, column 3: a key that is a list or mapping; give a word."),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document begins (`---`); keep one."),
        ('a: "C:\\q"', "line 1, column 8: `\\` begins an escape in double quotes; use single quotes."),
        ("a: \0", "it has a character that is no text; save it as UTF-8 text."),
    ],
)
def test_syntax_errors_say_where_and_how_to_mend(text: str, said: str) -> None:
    (problem,) = problems(parse_yaml, text, "c.yaml")
    assert problem.startswith("c.yaml: not readable as YAML") and said in problem, problem
    assert "\n" not in problem and not LEAKS.search(problem)


@given(st.text(alphabet="ab:-[]{}'\"!&*?|>#@%,\n\t ", max_size=30))
@settings(deadline=None, max_examples=500)
def test_any_text_is_a_value_or_one_sentence(text: str) -> None:
    try:
        parse_yaml(text, "c.yaml")
    except ConfigError as error:
        (problem,) = error.problems
        assert "\n" not in problem and not LEAKS.search(problem), problem


def test_override_that_is_no_yaml_names_itself() -> None:
    (problem,) = problems(parse_overrides, ["a=[1"])
    assert problem.startswith("--set a=[1: not readable as YAML, line 1, column 1: a list that is opened here")


# --- one for the other ------------------------------------------------------------------------------------------


def test_study_and_configuration_are_told_apart() -> None:
    run, study = EXAMPLES / "demo.yaml", EXAMPLES / "compare.yaml"
    assert problems(load_config, study) == [
        f"{study}: is a study and not the configuration of a run; use: fedpeft compare {study}"
    ]
    assert problems(load_study, run) == [f"{run}: is the configuration of one run and no study; use: fedpeft run {run}"]


# --- what nobody has set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "partition", "said"),
    [
        ({}, {"clients": 5}, "method.cohort: 10 (the default) is above partition.clients = 5; "),
        ({"cohort": 10}, {"clients": 5}, "method.cohort: 10 is above partition.clients = 5; "),
        ({"cohort": 30}, {}, "method.cohort: 30 is above partition.clients = 24 (the default); "),
    ],
)
def test_conflicts_say_which_side_nobody_has_set(method: Any, partition: Any, said: str) -> None:
    (problem,) = problems(load_config, {"method": method, "partition": partition})
    assert problem.startswith(said)


def test_what_is_not_set_is_known_through_overrides_and_second_loads() -> None:
    config = load_config({"method": {"lr": 0.1}, "run": {"rounds": 3}}, {"run.stop.score": 0.5})
    for again in (config, load_config(config)):
        unset = defaults_of(again)
        assert {"method.cohort", "partition.clients", "run.seed", "adapter.rank", "task.name"} <= unset
        assert not unset & {"method.lr", "run.rounds", "run.stop"}
    assert "method.cohort" not in defaults_of(load_config(config, {"method.cohort": 3}))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "partition.clients is 24, but there are only 9 training rows",
            "partition.clients is 24 (the default), but there are only 9 training rows",
        ),
        ("method.cohort is 3 and there are 2 clients", "method.cohort is 3 and there are 2 clients"),
        ("partition.clients is 240; lower it", "partition.clients is 240; lower it"),
        ("something else", "something else"),
    ],
)
def test_errors_of_the_data_say_what_nobody_has_set(message: str, expected: str) -> None:
    config = load_config({"method": {"cohort": 3}})
    with pytest.raises(DataError) as caught, naming_defaults(config):
        raise DataError(message)
    assert str(caught.value) == expected
