"""Secrets are taken out of what is written down, and nothing else is."""

from typing import Any

import pytest

from ldm_scale.core.secrets import without_secrets


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("https://me:hunter2@host/a.tar", "https://***@host/a.tar"),
        ("https://host/{0..9}.tar?sv=1&sig=aB%3D&se=2", "https://host/{0..9}.tar?sv=1&sig=***&se=2"),
        ("data.images='s3://b/a?X-Amz-Security-Token=t&X-Amz-Signature=s'",
         "data.images='s3://b/a?X-Amz-Security-Token=***&X-Amz-Signature=***'"),
        ("tracker.alert_command=curl https://hooks/T0/B1", "tracker.alert_command=***"),
        ("s3://bucket/key/{000..999}.tar", "s3://bucket/key/{000..999}.tar"),
        ("a photograph of someone@work, at 5:30", "a photograph of someone@work, at 5:30"),
    ],
)  # fmt: skip
def test_of_a_text(given: str, written: str) -> None:
    assert without_secrets(given) == written


def test_of_a_configuration() -> None:
    given: dict[str, Any] = {
        "tracker": {"alert_command": "mail me", "tags": ["a"]},
        "data": {"images": ["https://a:b@c/d"], "threads": 4, "removed": None},
    }
    assert without_secrets(given) == {
        "tracker": {"alert_command": "***", "tags": ["a"]},
        "data": {"images": ["https://***@c/d"], "threads": 4, "removed": None},
    }
    assert without_secrets({"alert_command": None}) == {"alert_command": None}
