"""One boto3 client a process for s3://, where Beam 2.77 makes a new one for every call, and a deadline for its calls.

A client costs 0.13 s of CPU each time (boto3 reads megabytes of JSON), thirty times the request itself, and every image
file and every step of a commit is a call. boto3's clients may be shared by threads. Importing this module is enough.

boto3 retries, and so does Beam around it: seven times, with waits of 5 s that double, which is ten minutes. Beam's
retries are taken off, and transforms/files/outage.py limits the others.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

from maskbeam.transforms.files import outage

# Of boto3, in all. Its waits between them double, up to 20 s.
_ATTEMPTS = 4


@functools.cache
def _s3_client(**settings: Any) -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    if settings.get("aws_access_key_id") is None and session.get_credentials() is None:  # Beam would try for minutes
        raise PermissionError(
            "no credentials for s3://: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --s3_access_key_id and "
            "--s3_secret_access_key"
        )
    config = Config(
        connect_timeout=outage.CONNECT_SECONDS,
        read_timeout=outage.READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
    )
    client = session.client(**settings, config=config)
    client.meta.events.register_first("before-call.s3", _before_call)
    client.meta.events.register_first("needs-retry.s3", _after_attempt)
    return client


def _before_call(**_: Any) -> None:
    outage.S3_OUTAGE.check()


def _after_attempt(response: Any, caught_exception: Exception | None, **_: Any) -> None:
    """Notes what an attempt came to; returns None, since whether there is another one is for boto3 to say."""
    if response is None:
        outage.S3_OUTAGE.failed(type(caught_exception).__name__)
    elif outage.is_fault(response[0].status_code):
        outage.S3_OUTAGE.failed(f"status {response[0].status_code}")
    else:
        outage.S3_OUTAGE.answered()


class _Session:
    """All that Beam asks of boto3.session.Session."""

    def client(self, **settings: Any) -> Any:
        return _s3_client(**settings)


def _without_retries(cls: type) -> None:
    for name, method in list(vars(cls).items()):
        if isinstance(method, types.FunctionType) and hasattr(method, "__wrapped__"):
            setattr(cls, name, method.__wrapped__)


with contextlib.suppress(ImportError):  # boto3 comes with an extra
    from apache_beam.io.aws import s3io
    from apache_beam.io.aws.clients.s3 import boto3_client

    if boto3_client.boto3 is not None:
        boto3_client.boto3 = types.SimpleNamespace(session=types.SimpleNamespace(Session=_Session))
    for cls in (s3io.S3IO, s3io.S3Downloader, s3io.S3Uploader, boto3_client.Client):
        _without_retries(cls)
    # For the one call that is not decorated.
    s3io.retry = types.SimpleNamespace(
        with_exponential_backoff=lambda **_: lambda call: call, retry_on_server_errors_and_timeout_filter=None
    )
