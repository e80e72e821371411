"""A deadline for gs://: each request of Google's client, which retries by itself, is limited and noted.

Importing this module is enough. See transforms/files/outage.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from maskbeam.transforms.files import outage


def limit_requests(request: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a requests.Session by which the client sends all it sends, with a timeout and an account."""

    def limited(*arguments: Any, **options: Any) -> Any:
        outage.GS_OUTAGE.check()
        options["timeout"] = (outage.CONNECT_SECONDS, outage.READ_SECONDS)
        try:
            response = request(*arguments, **options)
        except Exception as error:  # requests' own, and those of credentials that cannot be refreshed
            outage.GS_OUTAGE.failed(type(error).__name__)
            raise
        if outage.is_fault(response.status_code):
            outage.GS_OUTAGE.failed(f"status {response.status_code}")
        else:
            outage.GS_OUTAGE.answered()
        return response

    return limited


with contextlib.suppress(ImportError):  # Google's client comes with an extra
    from apache_beam.io.gcp import gcsio

    create_client = gcsio.create_storage_client

    def _create_limited_client(*arguments: Any, **options: Any) -> Any:
        client = create_client(*arguments, **options)
        client._http.request = limit_requests(client._http.request)
        return client

    gcsio.create_storage_client = _create_limited_client
