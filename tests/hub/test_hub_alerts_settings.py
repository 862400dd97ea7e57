"""What config.toml may say about alerts, and what doctor makes of it."""

from pathlib import Path

import pytest

from trainctl.cli.checks import Finding, alerts, sources
from trainctl.wire.settings import AlertSettings, SettingsError, load_settings, settings_file


def configured(text: str) -> Path:
    settings_file().parent.mkdir(parents=True, exist_ok=True)
    settings_file().write_text(text)
    return settings_file()


def test_without_a_file_there_is_no_command() -> None:
    assert load_settings().alerts == AlertSettings()
    assert load_settings().alerts.arguments == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("\"/bin/page --team 'on call'\"", ["/bin/page", "--team", "on call"]),
        ('["/bin/page", "a b"]', ["/bin/page", "a b"]),
        ('"~/page.sh ~x"', [str(Path.home() / "page.sh"), "~x"]),
        ('""', []),
        ("[]", []),
    ],
)
def test_a_command_is_words_and_never_a_shells(command: str, words: list[str]) -> None:
    configured(f"[alerts]\ncommand = {command}\n")
    assert load_settings().alerts.arguments == words


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ('command = "a \'b"', "No closing quotation"),
        ('command = [""]', "begins with an empty word"),
        ('command = "~nobody-of-this-name/page"', "command cannot be used"),
        ("command = 3", "command"),
        ("timeout_s = 0", "timeout_s"),
        ("timeout_s = 86400", "timeout_s"),
        ("repeat_s = nan", "repeat_s"),
        ("per_hour = -1", "per_hour"),
        ('severity = "good"', "severity"),
        ('severity = "loud"', "severity"),
    ],
)
def test_what_cannot_be_used_is_refused_where_the_file_is_read(setting: str, says: str) -> None:
    path = configured(f"[alerts]\n{setting}\n")
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert str(path) in str(refused.value)
    assert says in str(refused.value)
    assert sources().verdict == "broken"
    assert alerts().verdict == "warning"


def told(finding: Finding) -> tuple[str, str]:
    return finding.verdict, finding.text


def test_doctor_names_a_setting_that_does_not_exist() -> None:
    configured('[alerts]\ncomand = "/bin/true"\n[alert]\n')
    assert sources().verdict == "warning"
    assert "there is no setting alert, alerts.comand" in sources().text


def test_doctor_names_a_command_that_is_not_there_or_may_not_run() -> None:
    assert told(alerts()) == ("ok", "no command: nobody is woken (docs/alerts.md)")
    configured('[alerts]\ncommand = "no-such-pager --now"\n')
    assert told(alerts())[0] == "warning"
    assert "no-such-pager does not exist" in alerts().text
    configured('[alerts]\ncommand = ["./page.sh", "x"]\n')
    script = settings_file().parent / "page.sh"
    script.write_text("#!/bin/sh\n")
    assert "./page.sh is not executable" in alerts().text
    script.chmod(0o700)
    assert told(alerts()) == ("ok", "./page.sh x is there")
    configured('[alerts]\ncommand = "sh -c true"\n')
    assert told(alerts())[0] == "ok"
