"""One boto3 client a process for s3://, where Beam 2.77 makes a new one for every call.

That costs 0.13 s of CPU each time (boto3 reads megabytes of JSON), thirty times the request itself, and every image
file and every step of a commit is a call. boto3's clients may be shared by threads. Importing this module is enough.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any


@functools.cache
def _s3_client(**settings: Any) -> Any:
    import boto3

    session = boto3.session.Session()
    if settings.get("aws_access_key_id") is None and session.get_credentials() is None:  # Beam would try for minutes
        raise PermissionError(
            "no credentials for s3://: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --s3_access_key_id and "
            "--s3_secret_access_key"
        )
    return session.client(**settings)


class _Session:
    """All that Beam asks of boto3.session.Session."""

    def client(self, **settings: Any) -> Any:
        return _s3_client(**settings)


with contextlib.suppress(ImportError):  # boto3 comes with an extra
    from apache_beam.io.aws.clients.s3 import boto3_client

    if boto3_client.boto3 is not None:
        boto3_client.boto3 = types.SimpleNamespace(session=types.SimpleNamespace(Session=_Session))
