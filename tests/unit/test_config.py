"""The configuration: flags, environment, file and defaults, from one declaration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sessile.config import Config, compose, settings
from sessile.core.limits import TenantPolicy
from sessile.errors import StartupError

WriteFile = Callable[[str], Path]


@pytest.fixture
def yaml_file(tmp_path: Path) -> WriteFile:
    def write(text: str) -> Path:
        path = tmp_path / "sessile.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(flags: dict[str, str], environment: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(StartupError) as caught:
        compose(flags, environment, file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_sources_every_section_has_its_defaults() -> None:
    assert compose() == Config()


def test_a_flag_wins_over_environment_and_file(yaml_file: WriteFile) -> None:
    config = compose({"page_size": "1"}, {"SESSILE_PAGE_SIZE": "2"}, yaml_file("page-size: 4"))
    assert config.scheduler.page_size == 1


def test_the_environment_wins_over_the_file(yaml_file: WriteFile) -> None:
    config = compose({}, {"SESSILE_PAGE_SIZE": "2"}, yaml_file("page-size: 4"))
    assert config.scheduler.page_size == 2


def test_the_file_wins_over_the_default(yaml_file: WriteFile) -> None:
    assert compose(file=yaml_file("page-size: 4")).scheduler.page_size == 4


def test_the_environment_can_name_the_file(yaml_file: WriteFile) -> None:
    path = yaml_file("page-size: 4")
    assert compose({}, {"SESSILE_CONFIG": str(path)}).scheduler.page_size == 4


@pytest.mark.parametrize("key", ["rows-max", "rows_max", "max-running-requests"])
def test_the_file_takes_names_and_aliases_with_dashes_or_underscores(yaml_file: WriteFile, key: str) -> None:
    assert compose(file=yaml_file(f"{key}: 8")).scheduler.rows_max == 8


def test_a_bare_on_or_off_in_yaml_is_a_choice_not_a_truth_value(yaml_file: WriteFile) -> None:
    config = compose(file=yaml_file("mixed-chunk: off\noverlap: on"))
    assert (config.scheduler.mixed_chunk, config.engine.overlap) == ("off", "on")


def test_a_whole_number_in_yaml_serves_where_a_fraction_may_stand(yaml_file: WriteFile) -> None:
    limit_ms = compose(file=yaml_file("step-limit-ms: 100")).engine.step_limit_ms
    assert isinstance(limit_ms, float) and limit_ms == 100


def test_null_in_yaml_stands_for_an_unset_setting(yaml_file: WriteFile) -> None:
    assert compose(file=yaml_file("rows-max: null")).scheduler.rows_max is None


def test_an_empty_file_and_an_empty_variable_set_nothing(yaml_file: WriteFile) -> None:
    assert compose({}, {"SESSILE_PORT": ""}, yaml_file("")) == Config()


def test_variables_of_others_are_left_alone() -> None:
    assert compose({}, {"PORT": "x", "SESSILEX": "y"}) == Config()


def test_a_wrong_type_names_the_setting_and_the_flag() -> None:
    message = refusal({"page_size": "many"}, {})
    assert message == "--page-size must be a whole number of tokens; got 'many' (flag --page-size)"


def test_a_value_out_of_range_names_the_setting_and_the_variable() -> None:
    message = refusal({}, {"SESSILE_PAGE_SIZE": "0"})
    assert message == "--page-size must be from 1 to 256 tokens; got 0 (environment variable SESSILE_PAGE_SIZE)"


def test_an_unknown_choice_lists_the_choices() -> None:
    assert "must be one of on, off; got 'maybe'" in refusal({"overlap": "maybe"}, {})


def test_not_a_number_is_out_of_range() -> None:
    assert "--step-limit-ms must be" in refusal({"step_limit_ms": "nan"}, {})


def test_an_unknown_variable_is_refused_with_the_nearest_known_one() -> None:
    message = refusal({}, {"SESSILE_PAGESIZE": "1"})
    assert message == "unknown environment variable SESSILE_PAGESIZE; did you mean SESSILE_PAGE_SIZE?"


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_known_one(yaml_file: WriteFile) -> None:
    path = yaml_file("pagesize: 1")
    assert refusal({}, {}, path) == f"unknown setting 'pagesize'; did you mean page-size? (file {path})"


@pytest.mark.parametrize("value", ["2001-99-99", "!!timestamp x", "!!int x", "0x_", "9" * 5000, "[" * 5000, "!!x 1"])
def test_what_the_library_makes_no_value_of_is_refused_in_one_line(yaml_file: WriteFile, value: str) -> None:
    path = yaml_file(f"rows-max: {value}")
    message = refusal({}, {}, path)
    assert message.startswith(f"the configuration file {path} is not YAML: ") and "\n" not in message


@pytest.mark.parametrize("text", ["rows-max: '{}'", "mixed-chunk: '{}'", "'{}': 1", "rows-max: [{}]"])
def test_a_refusal_repeats_little_of_what_it_refuses(yaml_file: WriteFile, text: str) -> None:
    path = yaml_file(text.format("x" * 10_000))
    assert len(refusal({}, {}, path)) < 400 + len(str(path))


def test_a_configuration_that_is_nested_too_deeply_is_none() -> None:
    with pytest.raises(StartupError, match="is not one"):
        Config.from_json('{"model":' * 5000)


def test_a_key_given_twice_in_the_file_is_refused(yaml_file: WriteFile) -> None:
    assert "--page-size is set twice" in refusal({}, {}, yaml_file("page-size: 1\npage_size: 2"))


def test_a_setting_given_by_name_and_by_alias_in_the_environment_is_refused() -> None:
    message = refusal({}, {"SESSILE_ROWS_MAX": "1", "SESSILE_MAX_RUNNING_REQUESTS": "2"})
    assert "sets rows_max, which another one sets too" in message


@pytest.mark.parametrize("text", ["page-size: sixteen", "page-size: 1.5", "page-size: true", "page-size: [1]"])
def test_a_wrong_type_in_the_file_names_file_and_setting(yaml_file: WriteFile, text: str) -> None:
    path = yaml_file(text)
    message = refusal({}, {}, path)
    assert message.startswith("--page-size must be a whole number of tokens; got ") and f"(file {path})" in message


@pytest.mark.parametrize("text", ["- page-size", "page-size", "a: [", "\x00", "? [1]\n: 2"])
def test_a_file_that_holds_no_settings_is_refused_in_one_line(yaml_file: WriteFile, text: str) -> None:
    path = yaml_file(text)
    assert str(path) in refusal({}, {}, path)


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "No such file" in refusal({}, {}, tmp_path / "none.yaml")


def test_a_configuration_survives_the_way_to_the_child_process() -> None:
    config = compose({"page_size": "1", "step_limit_ms": "12.5", "mixed_chunk": "off"})
    assert Config.from_json(config.to_json()) == config
    assert "\n" not in config.to_json()


def test_tenants_reach_the_child_process_and_no_key_does() -> None:
    policy = TenantPolicy("acme", weight=3, sessions_max=5, shares_prefixes=True)
    config = replace(compose({"keys": "keys.yaml"}), tenants=(policy,))
    assert Config.from_json(config.to_json()).tenants == (policy,)


def test_the_key_of_our_own_clients_is_no_setting() -> None:
    assert compose({}, {"SESSILE_API_KEY": "sk-secret"}) == Config()


@pytest.mark.parametrize("text", ["", "{", '{"scheduler": {"page_size": "x"}}'])
def test_a_damaged_configuration_does_not_reach_the_engine(text: str) -> None:
    with pytest.raises(StartupError, match="handed to the engine"):
        Config.from_json(text)


def test_every_setting_can_be_set_by_its_default_as_text() -> None:
    for setting in settings():
        default = setting.declared.default
        if default is not None:
            assert setting.parse(str(default), "test") == default
